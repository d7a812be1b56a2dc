"""A run of `fit` with a loss scale: the task is given it, and what it trains has the bits of a run
without one, over a resume too; norms of the gradient are in the history.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, LossScale
from distnadam.errors import ConfigError
from tests.training.test_fit import Quadratic, train, weights


class Scaled(Quadratic):
    """Multiplies its gradients; one overflows at a step."""

    def __init__(self, overflows_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.overflows_at = overflows_at

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        return (step, rank) == self.overflows_at, super().batch(step, rank, world_size)

    def loss_and_gradients(
        self, params: Any, batch: Any, loss_scale: float = 1.0
    ) -> tuple[float, Any]:
        overflows, noise = batch
        loss, gradients = super().loss_and_gradients(params, noise)
        factor = np.float32(np.inf if overflows else loss_scale)
        with np.errstate(invalid="ignore"):
            return loss, {"w": gradients["w"] * factor}


@pytest.mark.on_ray
def test_a_scaled_run_has_the_bits_of_one_that_is_not(tmp_path: Path, backend: str) -> None:
    def optimizer() -> DistNadam:
        scale = LossScale(init_scale=2.0**10, growth_interval=3)
        return DistNadam(loss_scale=scale, global_clipnorm=1e6)

    plain = train(tmp_path / "plain", 8, optimizer=DistNadam(global_clipnorm=1e6))
    where = tmp_path / "scaled"
    first = train(where, 4, Scaled(), optimizer=optimizer(), backend=backend)
    rest = train(where, 8, Scaled(), optimizer=optimizer(), backend=backend)
    assert weights(where) == weights(tmp_path / "plain")
    assert first.losses + rest.losses == plain.losses
    assert first.gradient_norms + rest.gradient_norms == plain.gradient_norms
    assert all(norm > 0.0 for norm in plain.gradient_norms)
    with DistNadam.restore(where, backend="local") as restored:
        assert restored.loss_scale == 2.0**12  # after two times three steps


def test_an_overflow_skips_the_step_on_all_ranks(tmp_path: Path) -> None:
    history = train(
        tmp_path, 4, Scaled(overflows_at=(2, 1)), optimizer=DistNadam(loss_scale=LossScale())
    )
    assert len(history.steps) == 4
    assert all(map(math.isnan, history.gradient_norms))
    with DistNadam.restore(tmp_path, backend="local") as restored:
        assert (restored.skipped, restored.loss_scale) == (1, 2.0**15)


def test_a_task_that_takes_no_scale_is_refused_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"loss_scale: task 'quadratic' must take the scale, as in "
        r"loss_and_gradients\(params, batch, loss_scale=1.0\); it has loss_and_gradients\(params",
    ):
        train(tmp_path / "run", optimizer=DistNadam(loss_scale=LossScale()))
    assert not (tmp_path / "run").exists()
