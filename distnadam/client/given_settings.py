"""What a worker is given for its next step alone, as a round has it: packed, and kept while the
same is given. No gradients.
"""

from distnadam.client.shard_group import ShardGroup
from distnadam.nadam.step_overrides import Betas, BetasByGroup, Rates
from distnadam.protocol.round_settings import ORDINARY, RoundSettings


class GivenSettings:
    """The settings of one worker's rounds, most of which give the same as the last."""

    def __init__(self, shards: ShardGroup) -> None:
        self._shards = shards
        self._last: tuple[Rates | None, Betas | BetasByGroup | None] | None = None
        self._settings = ORDINARY

    def of(
        self, found_inf: bool, lr: Rates | None, betas: Betas | BetasByGroup | None
    ) -> RoundSettings:
        """Return what a round has of the arguments of `Worker.push`.

        Raises:
            ConfigError: as there.
        """
        is_plain = not found_inf and _are_numbers(lr, betas)
        if is_plain and self._last == (lr, betas):
            return self._settings
        overrides = self._shards.overrides(lr, betas)
        settings = RoundSettings(found_inf=bool(found_inf), overrides=overrides)
        if is_plain:
            self._last = (dict(lr) if isinstance(lr, dict) else lr), betas  # whose owner may change
            self._settings = settings
        return settings


def _are_numbers(lr: Rates | None, betas: Betas | BetasByGroup | None) -> bool:
    """Whether they are Python's own numbers, whose bits are equal where they are, but for a zero's
    sign, which a round has not.
    """
    rates = lr.values() if type(lr) is dict else (lr,)
    pair = () if betas is None else betas
    return type(pair) is tuple and set(map(type, (*rates, *pair))) == {float}
