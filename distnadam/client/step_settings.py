"""What a step was made with: learning rates and betas, as a worker reads them back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distnadam.nadam.step_overrides import NOT_SET, Betas, unpacked_overrides
from distnadam.nadam.step_scalars import Clock, each_setting
from distnadam.protocol.messages import Description
from distnadam.schedules import rate_at


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the last applied step was made with; what the first would be before there is one.

    Attributes:
        round: rounds decided so far: applied, skipped or refused.
        iterations: steps applied so far.
        lr: the learning rates by the pattern of their group, None being tensors in no group; as
            `Worker.step` takes them.
        betas: beta_1 and beta_2.
    """

    round: int
    iterations: int
    lr: Mapping[str | None, float]
    betas: Betas


def settings_of(now: Description) -> StepSettings:
    """Return what a shard that describes itself so has last stepped with."""
    config = now.config
    given = unpacked_overrides(now.overrides) or [NOT_SET]
    lr, beta_1, beta_2 = given[0]
    step = max(0, now.iterations - 1)
    if math.isnan(lr):
        lr = rate_at(config.lr, step)
    own = [each[0] for each in given[1:]]
    rates = [rate for rate, _ in each_setting(lr, Clock(step), config, own)]
    return StepSettings(
        round=now.round,
        iterations=now.iterations,
        lr=dict(zip([None, *(group.pattern for group in config.groups)], rates, strict=True)),
        betas=(
            config.beta_1 if math.isnan(beta_1) else beta_1,
            config.beta_2 if math.isnan(beta_2) else beta_2,
        ),
    )
