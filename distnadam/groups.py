"""Groups of tensors with settings of their own: what a group is, and which tensors are in it.

A group names its tensors by a pattern over their paths. A path's segments are what slashes and dots
separate. Of a name with dots, as torch's are, `_orig_mod` and a first `module` are none: wrappers
put them there.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from distnadam.checks import BETAS, check_beta, check_flag, set_number
from distnadam.errors import ConfigError
from distnadam.schedules import Rate, Schedule, kept, rate_at, rate_from, rate_to_dict

_NEAR, _LOOKED_AT = 3, 2000
"""Paths that are shown of those near a pattern that matches none, and looked at for that."""


@dataclass(frozen=True)
class Group:
    """Settings of the tensors whose paths match a pattern; those left out are the optimizer's.

    Args:
        pattern: a path in which ``*`` stands for anything within a segment, and ``**`` for any
            number of segments, also none; nothing else is special.
        lr_scale: factor of the optimizer's learning rate; not together with `lr`.
        lr: a learning rate of its own, a number or a `Schedule`.
        beta_1: as the optimizer's; with one of its own the group has a product of the momentum
            coefficients of its own.
        beta_2: as the optimizer's.
        epsilon: as the optimizer's.
        weight_decay: as the optimizer's.
        clipnorm: as the optimizer's, which must not clip by `global_clipnorm` then.
        clipvalue: as the optimizer's.
        trainable: False keeps the tensors as they are. Their gradients may be of any value, and
            None.

    Raises:
        ConfigError: naming the group's pattern, the setting and its value.

    >>> Group("**/bias", weight_decay=0.0)
    Group('**/bias', weight_decay=0.0)
    """

    pattern: str
    _: KW_ONLY
    lr_scale: float = 1.0
    lr: Rate | None = None
    beta_1: float | None = None
    beta_2: float | None = None
    epsilon: float | None = None
    weight_decay: float | None = None
    clipnorm: float | None = None
    clipvalue: float | None = None
    trainable: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not segments(self.pattern):
            raise ConfigError(
                f"groups: a group's pattern must be a path such as '**/bias', got {self.pattern!r}"
            )
        if mixed := [s for s in segments(self.pattern) if "**" in s and s != "**"]:
            raise ConfigError(
                f"group {self.pattern!r}: ** stands for whole segments, got {mixed[0]!r}"
            )
        try:
            self._check()
        except ConfigError as error:
            raise ConfigError(f"group {self.pattern!r}: {error}") from None

    def _check(self) -> None:
        set_number(self, "lr_scale")
        for name in BETAS:
            if getattr(self, name) is not None:
                check_beta(self, name)
        for name in ("epsilon", "weight_decay", "clipnorm", "clipvalue"):
            if getattr(self, name) is not None:
                set_number(self, name)
        object.__setattr__(self, "trainable", check_flag("trainable", self.trainable))
        if self.lr is None:
            return
        if self.lr_scale != 1.0:
            raise ConfigError(
                f"lr_scale={self.lr_scale!r} and lr={self.lr!r} cannot both be set: give one of "
                "them"
            )
        if not callable(self.lr):
            set_number(self, "lr")
        elif not isinstance(self.lr, Schedule):
            raise ConfigError(f"lr must be a number or a Schedule, got {self.lr!r}")
        rate_at(self.lr, 0)
        object.__setattr__(self, "lr", kept(self.lr))

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._given().items())
        return f"Group({self.pattern!r}{', ' if given else ''}{given})"

    def _given(self) -> dict[str, Any]:
        """Return the settings that are not the defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "pattern" and getattr(self, f.name) != f.default
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `of`: the pattern, and the settings that are not the defaults."""
        given = self._given()
        rate = {} if self.lr is None else {"lr": rate_to_dict(self.lr)}
        return {"pattern": self.pattern, **given, **rate}

    @classmethod
    def of(cls, given: Any) -> "Group":
        """Return a group unchanged, or that of `to_dict`'s plain data.

        Raises:
            ConfigError: it is neither, or a setting that no group has.
        """
        if isinstance(given, Group):
            return given
        if not isinstance(given, Mapping) or "pattern" not in given:
            raise ConfigError(f"groups: expected Group(pattern, ...), got {given!r}")
        unknown = sorted(map(str, given.keys() - {f.name for f in dataclasses.fields(cls)}))
        if unknown:
            raise ConfigError(f"groups: a group has no setting {unknown[0]!r}")
        settings = {key: value for key, value in given.items() if key != "pattern"}
        if "lr" in settings:
            settings["lr"] = rate_from(settings["lr"])
        return cls(given["pattern"], **settings)


def groups_of(groups: Sequence[Group], paths: Sequence[str]) -> list[int]:
    """Return for each path the index of the first group whose pattern matches it, or -1.

    Raises:
        ConfigError: a pattern matches no path, or only those of earlier groups.
    """
    found = [-1] * len(paths)
    named = ["".join(f"{segment}/" for segment in segments(path)) for path in paths]
    for number, group in enumerate(groups):
        pattern = _compiled(group.pattern)
        matched = [index for index, path in enumerate(named) if pattern.fullmatch(path)]
        free = [index for index in matched if found[index] < 0]
        if not free:
            raise ConfigError(_refusal(groups, number, matched, paths, found))
        for index in free:
            found[index] = number
    return found


def in_words(value: Any) -> str:
    """Return the plain data of a setting as it is written in Python, groups and schedules too."""
    if isinstance(value, Mapping) and "pattern" in value:
        rest = {name: each for name, each in value.items() if name != "pattern"}
        return f"Group({', '.join([repr(value['pattern']), *_arguments(rest)])})"
    if isinstance(value, Mapping) and value.keys() == {"class_name", "config"}:
        config = value["config"] if isinstance(value["config"], Mapping) else {}
        return f"{value['class_name']}({', '.join(_arguments(config))})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(in_words, value))}]"
    return repr(value)


def changed_groups(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Return how two lists of groups' plain data differ: by ``groups['<pattern>']`` both of a
    group, None where there is none; where only the order differs, both under ``groups``.
    """
    one, other = ({each["pattern"]: each for each in groups} for groups in (first, second))
    changed = {
        f"groups[{pattern!r}]": (one.get(pattern), other.get(pattern))
        for pattern in {**one, **other}
        if one.get(pattern) != other.get(pattern)
    }
    if not changed and list(first) != list(second):
        return {"groups": (list(first), list(second))}
    return changed


def _arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={in_words(value)}" for name, value in values.items()]


def segments(path: str) -> list[str]:
    """Return the segments of a path, or of a pattern."""
    found: list[str] = []
    for name in path.split("/"):
        parts = [part for part in name.split(".") if part]
        if len(parts) > 1:
            parts = [part for part in parts if part != "_orig_mod"]
            while len(parts) > 1 and parts[0] == "module":
                parts = parts[1:]
        found += parts
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(
        "".join(
            "(?:[^/]+/)*" if segment == "**" else re.escape(segment).replace(r"\*", "[^/]*") + "/"
            for segment in segments(pattern)
        )
    )


def _refusal(
    groups: Sequence[Group],
    number: int,
    matched: Sequence[int],
    paths: Sequence[str],
    found: Sequence[int],
) -> str:
    pattern = groups[number].pattern
    if matched:
        earlier = groups[found[matched[0]]].pattern
        return (
            f"group {pattern!r} matches only tensors that groups before it take, as "
            f"{paths[matched[0]]!r}, which is in group {earlier!r}: put the narrower pattern first"
        )
    near = difflib.get_close_matches(pattern, paths[:_LOOKED_AT], _NEAR, cutoff=0.0)
    return f"group {pattern!r} matches no tensor; near it are {', '.join(map(repr, near))}"
