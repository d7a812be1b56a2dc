"""Groups of tensors to and from frameworks: what a framework without them would do differently, and
the patterns that name the tensors to which a file gives settings of their own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distnadam.checks import BETAS
from distnadam.errors import CheckpointError, ConfigError, ConversionError
from distnadam.groups import Group, groups_of, segments
from distnadam.interop.formulas import Conversion, clipping_groups, with_own_product
from distnadam.interop.optimizer_state import OptimizerState
from distnadam.nadam.step_scalars import TensorClock

Own = dict[str, Any]
"""Settings of one tensor that are not those of most, as `Group` takes them; {}: none."""
USE_GROUPS = (
    "distnadam has groups for that: leave it out, and give groups in config, such as "
    "[{'pattern': '**/bias', 'weight_decay': 0.0}]"
)
"""The remedy for what says which tensors a framework does not decay."""
_SHOWN = 3


def few(names: Sequence[str]) -> str:
    """Return the first names, and whether there are more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(map(repr, names[:_SHOWN]))}{more}"


def undecayed(state: OptimizerState) -> list[str]:
    """Return the trained tensors from which no weight decay takes, where it takes from others."""
    if not state.weight_decay:
        return []
    return [state.names[i] for i in state.trained(None) if not state.settings[i][1].weight_decay]


def find_one_for_all(
    job: Conversion,
    state: OptimizerState,
    what: str,
    *,
    scale: str | None = None,
    clips: Sequence[str] = (),
) -> None:
    """Add a difference for each setting that groups have, and of which `what` has one for all, and
    for tensors' clocks where they differ.

    Args:
        job: receives the differences.
        state: ours.
        what: the other framework's optimizer.
        scale: the remedy for a learning rate of a group; None: there is none.
        clips: the clips that `what` has.
    """
    trained = {state.groups[i]: state.settings[i] for i in state.trained(None)}
    remedy = "" if scale is None else f": {scale}"
    decays = {own.weight_decay for _, own in trained.values()} - {0.0}
    for number, (rate, own) in sorted(trained.items()):
        if number < 0:
            continue
        group = state.config.groups[number]
        if rate != state.rate:
            job.differences.append(
                f"learning rate: {rate:g} of {group!r} here, and {what} has one for all tensors, "
                f"{state.rate:g}{remedy}"
            )
        for name in (*BETAS, "epsilon"):
            here, there = getattr(own, name), getattr(state.config, name)
            if here != there:
                job.differences.append(
                    f"{name}: {here:g} of {group!r} here, and {what} has one for all tensors, "
                    f"{there:g}"
                )
        if len(decays) > 1 and own.weight_decay not in (0.0, state.weight_decay):
            job.differences.append(
                f"weight_decay: {own.weight_decay:g} of {group!r} here, and {what} has one for all "
                f"tensors that decay, {state.weight_decay:g}"
            )
    _find_clocks(job, state, what)
    for name in clips:
        for group in clipping_groups(state, name):
            if getattr(group, name) != getattr(state.config, name):
                job.differences.append(
                    f"{name}: {getattr(group, name):g} of {group!r} here, and {what} has one for "
                    "all tensors"
                )


def _find_clocks(job: Conversion, state: OptimizerState, what: str) -> None:
    """Add a difference for tensors that have another clock than the optimizer's."""
    clock = with_own_product(state).clock
    whole = TensorClock(clock.iterations, clock.m_schedule)
    others = [i for i in state.trained(None) if clock.of_tensor(i) != whole]
    if others:
        first = clock.of_tensor(others[0])
        job.differences.append(
            f"clocks: {few([state.names[i] for i in others])} here after {first.steps} steps, with "
            f"a product of momentum coefficients of {first.product:.6g}, and {what} has one clock "
            f"for all tensors, {whole.steps} and {whole.product:.6g}"
        )


def note_frozen(job: Conversion, state: OptimizerState, remedy: str) -> None:
    """Note that frozen tensors are left out of the other optimizer's list.

    Raises:
        ConversionError: all are frozen, and no framework has an optimizer of nothing.
    """
    if len(state.frozen) == len(state.names):
        raise ConversionError(
            f"{job.path}: every tensor is frozen, and an optimizer of none cannot be written"
        )
    if state.frozen:
        job.notes.append(
            f"frozen: {few(state.frozen)}: among the parameters and not in the optimizer's list; "
            f"{remedy}"
        )


def groups_given(job: Conversion) -> list[Group]:
    """Return the groups in the `config` of an import; raise ConfigError if they are none."""
    given = job.config.get("groups", ())
    if isinstance(given, (str, Mapping)) or not hasattr(given, "__iter__"):
        raise ConfigError(f"groups must be a list of Group, got {given!r}")
    return [Group.of(each) for each in given]


def names_in(where: str, about: Mapping[str, Any], key: str) -> list[str]:
    """Return the tensors that a file's description lists under `key`, empty if it does not.

    Raises:
        CheckpointError: it is no list of names.
    """
    names = about.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: its {key}: expected a list of names, got {names!r:.80}")
    return names


def frozen_in(job: Conversion, about: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the tensors that a file's description or the groups of `config` freeze.

    Raises:
        CheckpointError: the description lists others than `names`.
        ConfigError: a group of `config` has no tensor.
    """
    listed = names_in(str(job.path), about, "frozen")
    unknown = [name for name in listed if name not in names]
    if unknown:
        raise CheckpointError(f"{job.path}: its frozen: {unknown[0]!r} is not among its parameters")
    given = groups_given(job)
    found = zip(names, groups_of(given, names), strict=True)
    by_config = {name for name, i in found if i >= 0 and not given[i].trainable}
    return [name for name in names if name in by_config or name in listed]


def base_and_own(settings: Mapping[str, Own]) -> tuple[Own, dict[str, Own]]:
    """Return the settings that most tensors have, and of each tensor those that differ."""
    if not settings:
        return {}, {}
    (most, _), *_ = Counter(map(repr, settings.values())).most_common(1)
    base = next(each for each in settings.values() if repr(each) == most)
    own = {
        name: {key: value for key, value in each.items() if repr(value) != repr(base[key])}
        for name, each in settings.items()
    }
    return base, own


def made_groups(job: Conversion, own: Mapping[str, Own]) -> list[Group]:
    """Return groups that give each tensor its own settings, behind those of the job's `config`,
    whose tensors keep what `config` says.

    Raises:
        CheckpointError: a setting is refused, by its name.
        ConversionError: naming a tensor that no pattern means alone.
    """
    first, names = groups_given(job), list(own)
    taken = {n for n, i in zip(names, groups_of(first, names), strict=True) if i >= 0}
    alike: dict[str, list[str]] = {}
    for name in names:
        if own[name] and name not in taken:
            alike.setdefault(repr(own[name]), []).append(name)
    try:
        short = [
            Group(pattern, **own[members[0]])
            for members in alike.values()
            for pattern in _patterns(names, members, taken)
        ]
        if _misses(first, short, own, taken) is None:
            return [*first, *short]
        exact = [Group(name, **own[name]) for members in alike.values() for name in members]
        missed = _misses(first, exact, own, taken)
    except ConfigError as error:
        raise CheckpointError(f"{job.path}: its groups: {error}") from error
    if missed is not None:
        raise ConversionError(
            f"{job.path}: {missed!r} has {own[missed] or 'the settings of most'} there, and no "
            "pattern of a group tells it from tensors that have others: '*' in a path matches "
            "anything, a dot is a slash, and 'module' and '_orig_mod' are left out; rename it"
        )
    return [*first, *exact]


def _misses(
    first: Sequence[Group], made: Sequence[Group], own: Mapping[str, Own], taken: set[str]
) -> str | None:
    """Return a tensor that would get other settings than its own, or none of a group meant for it;
    None if all is as meant.
    """
    names, groups = list(own), [*first, *made]
    try:
        found = groups_of(groups, names)
    except ConfigError:  # a group without a tensor: earlier ones take what it is meant for
        return next(each.pattern for n, each in enumerate(groups) if _lacks(groups[: n + 1], names))
    for name, number in zip(names, found, strict=True):
        if name in taken:
            continue
        got = {} if number < 0 else groups[number].to_dict()
        got.pop("pattern", None)
        meant = Group("any", **own[name]).to_dict() if own[name] else {}
        meant.pop("pattern", None)
        if got != meant or (number >= 0) != bool(own[name]):
            return name
    return None


def _lacks(groups: Sequence[Group], names: Sequence[str]) -> bool:
    try:
        groups_of(groups, names)
    except ConfigError:
        return True
    return False


def _patterns(names: Sequence[str], members: Sequence[str], taken: set[str]) -> list[str]:
    """Return patterns that match all members and, of the others, only taken ones.

    Each is the end of paths, behind ``**/``, or their beginning, before ``/**``, where it means
    several; else a path.
    """
    meant = set(members)
    covers: dict[str, set[str]] = {}
    spoilt: set[str] = set()
    for name in names:
        for pattern in _short(name):
            if name in meant:
                covers.setdefault(pattern, set()).add(name)
            elif name not in taken:
                spoilt.add(pattern)
    found: list[str] = []
    waiting = dict.fromkeys(members)
    while waiting:
        name = next(iter(waiting))
        fitting = [p for p in _short(name) if p not in spoilt and "*" not in name]
        best = max(fitting, key=lambda pattern: len(covers[pattern] & waiting.keys()), default=name)
        done = covers.get(best, {name}) & waiting.keys()
        if len(done) < 2:
            best, done = name, {name}
        found.append(best)
        for each in done:
            del waiting[each]
    return found


def _short(path: str) -> list[str]:
    """Return the patterns of ends and beginnings of a path, short ones first."""
    parts = segments(path)
    ends = ["/".join(["**", *parts[-n:]]) for n in range(1, len(parts) + 1)]
    return ends + ["/".join([*parts[:n], "**"]) for n in range(1, len(parts) + 1)]
