"""Learning rates and betas that hold for one step alone, in place of the optimizer's own.

They are kept as their bytes, so that those of two ranks are equal where every bit of them is: three
little-endian float64 for tensors in no group, then three for each group, as far as one is set;
NaN where the optimizer's own hold.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from distnadam.checks import check_as
from distnadam.errors import ConfigError

NUM_EACH = 3
"""Of each setting: the learning rate, beta_1 and beta_2."""
_SIZE = 8 * NUM_EACH
_ONE = struct.Struct(f"<{NUM_EACH}d")
NOT_SET = (math.nan, math.nan, math.nan)

Rates = float | Mapping[str | None, float]
"""A learning rate; or several, by the pattern of their group, None being tensors in no group."""
Betas = tuple[float, float]
BetasByGroup = Mapping[str | None, Betas]


def packed_overrides(
    lr: Rates | None, betas: Betas | BetasByGroup | None, patterns: Sequence[str] | None
) -> bytes:
    """Return the bytes of overrides; none where all are None.

    Args:
        lr: one number for tensors in no group, which a group's `lr_scale` scales; or some by group.
        betas: beta_1 and beta_2 of all that have none of their own; or some by group.
        patterns: those of the groups, in order; None if they are not known, as for single ones.

    Raises:
        ConfigError: naming the value that is out of its range, or the group that there is not.
    """
    if lr is None and betas is None:
        return b""
    rates: dict[Any, Any] = dict(lr) if isinstance(lr, Mapping) else {None: lr}
    pairs: dict[Any, Any] = dict(betas) if isinstance(betas, Mapping) else {None: betas}
    found = []
    for pattern in (None, *(patterns or ())):
        rate, pair = rates.pop(pattern, None), pairs.pop(pattern, None)
        whose = "" if pattern is None else f" of group {pattern!r}"
        one = NOT_SET[0] if rate is None else _checked_lr(f"lr{whose}", rate)
        two = NOT_SET[1:] if pair is None else _checked_betas(whose, pair)
        found.append((one, *two))
    for name, rest in (("lr", rates), ("betas", pairs)):
        if rest:
            raise ConfigError(
                f"{name}: there is no group {next(iter(rest))!r}; expected patterns of groups, "
                f"which are {list(patterns or ())}, or None for tensors in no group"
            )
    while len(found) > 1 and all(map(math.isnan, found[-1])):
        found.pop()
    if len(found) == 1 and all(map(math.isnan, found[0])):
        return b""
    return b"".join(_ONE.pack(*each) for each in found)


def check_overrides(overrides: object) -> None:
    """Raise TypeError for what `packed_overrides` cannot have returned."""
    if not isinstance(overrides, bytes) or len(overrides) % _SIZE:
        raise TypeError(f"overrides are {overrides!r:.50}")
    for lr, *betas in _ONE.iter_unpack(overrides):
        if not (math.isnan(lr) or 0.0 <= lr < math.inf) or not all(
            math.isnan(beta) or 0.0 <= beta < 1.0 for beta in betas
        ):
            raise TypeError(f"overrides are {lr!r}, {betas!r}")


def unpacked_overrides(overrides: bytes) -> list[tuple[float, ...]]:
    """Return for tensors in no group, then for each group as far as one is set, the learning rate,
    beta_1 and beta_2, NaN where they are not set.
    """
    return list(_ONE.iter_unpack(overrides))


def sets_groups(overrides: bytes) -> bool:
    """Whether a group has an override of its own."""
    return len(overrides) > _SIZE


def overrides_in_words(overrides: bytes) -> str:
    """Return overrides as words for an error.

    >>> overrides_in_words(packed_overrides(0.5, None, None))
    'lr=0.5'
    """
    words = []
    for number, values in enumerate(unpacked_overrides(overrides)):
        names = ("lr", "beta_1", "beta_2")
        given = [f"{n}={v!r}" for n, v in zip(names, values, strict=True) if not math.isnan(v)]
        if given:
            words.append((f"group {number - 1}: " if number else "") + ", ".join(given))
    return "; ".join(words) or "none"


def _checked_lr(name: str, lr: object) -> float:
    number: float = check_as(float, name, lr)
    return number + 0.0  # no -0.0, whose bits are others


def _checked_betas(whose: str, betas: object) -> Betas:
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ConfigError(f"betas{whose} must be (beta_1, beta_2), got {betas!r}")
    names = f"beta_1{whose}", f"beta_2{whose}"
    beta_1, beta_2 = (check_as(float, name, b) for name, b in zip(names, betas, strict=True))
    for name, beta in zip(names, (beta_1, beta_2), strict=True):
        if not beta < 1.0:
            raise ConfigError(f"{name} must be in [0, 1), got {beta!r}")
    return beta_1 + 0.0, beta_2 + 0.0
