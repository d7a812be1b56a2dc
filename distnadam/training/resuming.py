"""What a run of `fit` goes on from: its newest checkpoint, and which of the settings given hold.

It reads checkpoints and starts nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import verify_files
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.client.building import restored_settings
from distnadam.config import CHANGEABLE, Settings
from distnadam.errors import CheckpointError, ConfigError, RayLost
from distnadam.groups import changed_groups, in_words
from distnadam.hyperparameters import NadamConfig
from distnadam.schedules import Rate
from distnadam.tensors.layout import Layout
from distnadam.training.task_state import TaskState

Found = tuple[Directory, Manifest]
"""A checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call of `fit` asks for.

    Args:
        label: the task's name.
        seed: given to `Task.init`.
        layout: the tensors of the task's parameters.
        settings: of the optimizer.
        state: of the task.
        is_given: whether an optimizer was given, so that its settings are asked for; else they are
            defaults, for a new run only.
        resume: as `fit` takes it.
        accumulate: micro-batches of each step.
    """

    label: str
    seed: int
    layout: Layout
    settings: Settings
    state: TaskState
    is_given: bool
    resume: str
    accumulate: int = 1

    @property
    def run(self) -> dict[str, Any]:
        """What every checkpoint of the run says of it."""
        parts = {"accumulate": self.accumulate} if self.accumulate > 1 else {}
        return {
            "task": self.label,
            "seed": self.seed,
            "num_workers": self.settings.topology.num_workers,
            "given": self.settings.config.to_dict(),
            **parts,
        }


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The settings of a resumed run, and the learning rate to set in it; None: the checkpoint's."""

    settings: Settings
    rate: Rate | None


def find_checkpoint(
    directory: Directory, request: Request, say: Callable[[str], None]
) -> Found | None:
    """Return the newest valid checkpoint of the run in a directory; None for a new run.

    Checkpoints of something else, which were saved there by hand, are passed over. Where no save
    was ever finished, there is none.

    Args:
        directory: where the run saves.
        request: what is to be trained.
        say: gets a sentence for each checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints and none is valid or of this run, or `resume` is not
            as it allows.
    """
    existing = store.step_directories(directory)
    if not any(store.MANIFEST in each.files() for each in reversed(existing)):
        _check_new(directory, existing, request, say)
        return None
    if request.resume == "never":
        raise CheckpointError(
            f"{directory}: holds checkpoints, the newest {existing[-1].name}; resume it, or choose "
            "another"
        )
    passed_over: list[str] = []
    foreign: list[str] = []
    try:
        for path, manifest in store.candidates(directory, passed_over):
            reason = _why_foreign(manifest, request)
            try:
                if reason is None:
                    verify_files(path, manifest)
                    break
                foreign.append(f"{path}: its checkpoint {reason}")
                passed_over.append(foreign[-1])
            except CheckpointError as error:
                passed_over.append(str(error))
    except CheckpointError as error:
        if foreign:
            raise CheckpointError(f"{foreign[0]}; choose another directory") from error
        raise
    for sentence in passed_over:
        say(f"passed over: {sentence}")
    say(f"resuming from {path}")
    return path, manifest


def _check_new(
    directory: Directory,
    unfinished: Sequence[Directory],
    request: Request,
    say: Callable[[str], None],
) -> None:
    if request.resume == "must":
        raise CheckpointError(f"{directory}: holds no checkpoint to resume from")
    for each in unfinished:
        say(f"passed over: {each}: the save was not finished")


def _why_foreign(manifest: Manifest, request: Request) -> str | None:
    """Return why a checkpoint is not of the run, or None if it is."""
    if not manifest.run:
        return "is of no run of fit: it was saved by hand"
    for key, ours in (("task", request.label), ("seed", request.seed)):
        if manifest.run.get(key) != ours:
            return f"is of {key} {manifest.run.get(key)!r}, this run's is {ours!r}"
    if Layout.from_dict(manifest.layout) != request.layout:
        return "has other tensors than the task's"
    return request.state.why_not(manifest.user_data)


def config_given_before(where: DirectoryLike, rate: Rate | None = None) -> NadamConfig | None:
    """Return the hyper-parameters that the run in a directory was last given; None without a run.

    Args:
        where: a directory of checkpoints.
        rate: a learning rate in place of the run's, whose class need not be imported then.

    Raises:
        ConfigError: its learning rate is a schedule of a class that is not imported here.
    """
    with suppress(CheckpointError):
        for step in reversed(store.step_directories(where)):
            with suppress(CheckpointError):
                if run := store.load(step).run:
                    given = run["given"]
                    lr = given["lr"] if rate is None else rate
                    return NadamConfig.from_dict({**given, "lr": lr})
    return None


def settings_of_resumed(found: Found, request: Request, say: Callable[[str], None]) -> Resumed:
    """Return the settings that a run goes on with, which are the checkpoint's unless others are
    given.

    A learning rate that is not the one that the run was given before is set. What is given as
    before leaves the run's as it is: a callback, or somebody else, may have changed it since.

    Raises:
        ConfigError: a hyper-parameter is given that a run cannot change.
    """
    directory, manifest = found
    run, saved = request.run, manifest.config
    if manifest.run.get("num_workers") != run["num_workers"]:
        say(
            f"the run had {manifest.run.get('num_workers')} workers and goes on with "
            f"{run['num_workers']}: batches are dealt differently from here on, so it will not end "
            "with the bits that it would have"
        )
    if (count := manifest.run.get("accumulate", 1)) != request.accumulate:
        raise ConfigError(
            f"accumulate={request.accumulate}: the run of {directory} has {count}, and its batches "
            "would be others; leave it as it was, or start another run in another directory"
        )
    before = manifest.run.get("given", saved)
    rate = None
    if not request.is_given:
        run["given"] = before
    else:
        _check_unchanged(directory, {**saved, **before}, saved, run["given"])
        if run["given"]["lr"] != before["lr"]:
            rate = request.settings.config.lr
            say(f"the learning rate is {_shown(run['given']['lr'])} from here on, as given")
        elif saved["lr"] != before["lr"]:
            say(
                f"the learning rate stays {_shown(saved['lr'])}, which it was changed to in the "
                f"run; it began with {_shown(before['lr'])}"
            )
        for name in CHANGEABLE[1:]:
            if saved[name] != before.get(name, saved[name]):
                say(
                    f"{name} stays {in_words(saved[name])}, which it was changed to in the run; it "
                    f"began with {in_words(before[name])}"
                )
    topology = request.settings.topology
    settings = restored_settings(
        directory,
        manifest,
        topology.to_dict(),
        request.settings.options if request.is_given else None,
    )
    return Resumed(settings=settings.with_run(run), rate=rate)


def _check_unchanged(
    directory: Directory,
    before: Mapping[str, Any],
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Raise ConfigError for settings that only a new run can have.

    Args:
        directory: the run's checkpoint.
        before: what the run was given before.
        saved: what it was changed to since.
        given: what it is given now.
    """
    differs = {key for key in given if given[key] not in (before[key], saved[key])}
    changed = [
        f"{key}={given[key]!r} (the run has {before[key]!r})"
        for key in given
        if key in differs - {"lr", "groups"}
    ]
    if "groups" in differs:
        changed += [
            f"{name}: {_or_none(ours)} (the run has {_or_none(theirs)})"
            for name, (theirs, ours) in changed_groups(before["groups"], given["groups"]).items()
        ]
    if changed:
        raise ConfigError(
            f"optimizer: {', '.join(changed)}: the run of {directory} cannot change this, only its "
            "learning rate; leave it as it was, or start another run in another directory"
        )


def _or_none(group: Any) -> str:
    return "none" if group is None else in_words(group)


def _shown(rate: Any) -> str:
    return str(rate["class_name"]) if isinstance(rate, Mapping) else f"{rate:g}"


def with_what_is_saved(error: RayLost, directory: Directory) -> RayLost:
    """Return the error of a run whose Ray died, with its newest checkpoint and how to go on."""
    step = -1
    with suppress(CheckpointError):
        _, newest = next(store.candidates(directory, []))
        step = newest.round
    saved = f"step {step} is saved" if step >= 0 else "no step is saved yet"
    return RayLost(
        f"{error}; {saved} in {directory}: call fit again, in a new process, with this "
        "checkpoint_dir",
        directory.place,
        step,
    )
