"""Dynamic loss scaling: by what losses are multiplied, so that gradients of half precision do not
vanish, and how that factor follows the rounds.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distnadam.checks import check_count, fields_of, set_number
from distnadam.errors import ConfigError

_LEAST = 2.0**-120
"""What no scale falls below, so that its reciprocal is a float32."""


class ScaleState(NamedTuple):
    """The scale of the next round, and the steps applied since it last changed."""

    scale: float
    growth_tracker: int = 0


@dataclass(frozen=True)
class LossScale:
    """A loss scale that the shards keep, named as torch.amp.GradScaler names it.

    Workers multiply their losses by `Worker.loss_scale` and push the gradients of those. They are
    divided by it before they are judged finite, and a rank whose gradients are not votes that all
    skip the round. The scale is a float32, as it is there.

    Args:
        init_scale: the scale of the first round.
        growth_factor: what it is multiplied by after `growth_interval` steps without a vote.
        backoff_factor: what it is multiplied by after a round that a vote has skipped.
        growth_interval: steps applied one after another, skipped rounds but for votes left out.

    Raises:
        ConfigError: a factor or the interval is out of its range.

    >>> LossScale(init_scale=1024.0).after(ScaleState(1024.0, 7), "voted")
    ScaleState(scale=512.0, growth_tracker=0)
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        for name in ("init_scale", "growth_factor", "backoff_factor"):
            set_number(self, name)
        count = check_count("growth_interval", self.growth_interval, least=1)
        object.__setattr__(self, "growth_interval", count)
        if not _LEAST <= self.init_scale <= 1 / _LEAST:
            raise ConfigError(
                f"loss_scale: init_scale must be in [{_LEAST:g}, {1 / _LEAST:g}], got "
                f"{self.init_scale!r}"
            )
        if not self.growth_factor > 1.0:
            raise ConfigError(
                f"loss_scale: growth_factor must be above 1, got {self.growth_factor!r}"
            )
        if not 0.0 < self.backoff_factor < 1.0:
            raise ConfigError(
                f"loss_scale: backoff_factor must be in (0, 1), got {self.backoff_factor!r}"
            )

    @property
    def first(self) -> ScaleState:
        """The state before the first round."""
        return ScaleState(_rounded(self.init_scale))

    def after(self, state: ScaleState, outcome: str) -> ScaleState:
        """Return the state after a round that ended so."""
        scale, tracker = state
        if outcome == "voted":
            return ScaleState(max(_LEAST, _rounded(scale * self.backoff_factor)))
        if outcome != "applied":
            return state
        if tracker + 1 < self.growth_interval:
            return ScaleState(scale, tracker + 1)
        grown = _rounded(scale * self.growth_factor)
        return ScaleState(grown if grown <= 1 / _LEAST else scale)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `of`."""
        return fields_of(self)

    @classmethod
    def of(cls, given: Any) -> "LossScale":
        """Return one unchanged, or that of `to_dict`'s plain data; raise ConfigError for others."""
        if isinstance(given, LossScale):
            return given
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(given, Mapping) or not given.keys() <= names:
            raise ConfigError(f"loss_scale must be a LossScale or None, got {given!r}")
        return cls(**given)


def is_scale_state(value: Any) -> bool:
    """Whether plain data is a `ScaleState`'s."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and type(value[0]) is float
        and math.isfinite(value[0])
        and _LEAST <= value[0] <= 1 / _LEAST
        and type(value[1]) is int
        and 0 <= value[1] < 1 << 63
    )


def _rounded(scale: float) -> float:
    """Return a scale as a float32 has it; one that is too large as infinite."""
    with np.errstate(over="ignore"):
        return float(np.float32(scale))
