"""`fit` with groups: what is frozen needs no gradient, and a resumed run keeps the groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group, fit
from distnadam.checkpoint import store
from distnadam.errors import ConfigError
from distnadam.schedules import Constant

STILL = Group("body/**", trainable=False)
HEAD = Group("head", lr_scale=0.5)


class Headed:
    """Fit a head to a target, above a body that has no gradients."""

    name = "headed"

    def init(self, seed: int) -> Any:
        self.seed = seed
        return {
            "body": {"w": np.full(9, 2, np.float32), "b": np.ones(3, np.float32)},
            "head": np.zeros(30, np.float32),
            "rest": np.zeros(4, np.float32),
        }

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        return np.random.default_rng([self.seed, step, rank]).standard_normal(30, np.float32)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        error = params["head"] - params["body"]["w"][0] + np.float32(0.1) * batch
        still = {"w": None, "b": None}
        return float((error**2).mean()), {"body": still, "head": error, "rest": error[:4]}

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"body": float(params["body"]["w"].sum()), "head": float(params["head"].mean())}


def train(directory: Path, steps: int, groups: Any = (STILL, HEAD), **how: Any) -> Any:
    if groups is not None:
        how["optimizer"] = DistNadam(lr=0.1, weight_decay=0.1, groups=groups)
    how = {"backend": "local", "num_workers": 2, "verbose": False} | how
    return fit(Headed(), steps=steps, checkpoint_dir=directory, **how)


def test_frozen_tensors_need_no_gradient_and_a_resumed_run_ends_alike(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    history = train(tmp_path / "parts", 6, groups=None)
    assert history.metrics == whole.metrics
    assert history.metrics["body"] == 18.0
    assert history.metrics["head"] > 0
    for name in ("whole", "parts"):
        manifest = store.load(tmp_path / name / "step_00000006")
        assert manifest.config["groups"] == [STILL.to_dict(), HEAD.to_dict()]
    assert train(tmp_path / "parts", 7).steps == [7]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [STILL, Group("head", lr=Constant(0.5))],
            (
                "groups['head']: Group('head', lr=Constant(rate=0.5)) (the run has Group('head', "
                "lr_scale=0.5))"
            ),
        ),
        ([STILL], "groups['head']: none (the run has Group('head', lr_scale=0.5))"),
        (
            [STILL, HEAD, Group("rest", weight_decay=0.0)],
            "groups['rest']: Group('rest', weight_decay=0.0) (the run has none)",
        ),
        (
            [HEAD, STILL],
            (
                "groups: [Group('head', lr_scale=0.5), Group('body/**', trainable=False)] (the run "
                "has [Group('body/**', trainable=False), Group('head', lr_scale=0.5)])"
            ),
        ),
    ],
)
def test_a_group_that_a_resumed_run_cannot_change_is_named(
    groups: list[Group], message: str, tmp_path: Path
) -> None:
    train(tmp_path, 2)
    with pytest.raises(ConfigError, match="cannot change this") as caught:
        train(tmp_path, 3, groups=groups)
    assert str(caught.value).startswith(f"optimizer: {message}: the run of ")
    assert train(tmp_path, 3).steps == [3]


class Thawing(Headed):
    """The body has gradients from the fourth batch of a rank on."""

    def batch(self, step: int, rank: int, world_size: int, micro_batch: int = 0) -> Any:
        return step, super().batch(step, rank, world_size)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        step, noise = batch
        loss, tree = super().loss_and_gradients(params, noise)
        if step >= 3:
            tree["body"] = {"w": np.ones(9, np.float32), "b": None}
        return loss, tree


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_task_may_have_no_gradient_of_a_tensor_and_a_resumed_run_ends_alike(
    accumulate: int, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"backend": "local", "num_workers": 2, "verbose": False}
    optimizer = DistNadam(lr=0.1, clocks="tensor")
    ends = []
    for directory, steps in (("whole", 6), ("parts", 2), ("parts", 6)):
        history = fit(
            Thawing(),
            steps=steps,
            checkpoint_dir=tmp_path / directory,
            optimizer=optimizer,
            accumulate=accumulate,
            **how,
        )
        ends.append(history.metrics)
    assert ends[0] == ends[2]
    assert ends[1]["body"] == 18.0 > ends[2]["body"]
    manifest = store.load(tmp_path / "parts" / "step_00000006")
    assert [manifest.clock.of_tensor(index).steps for index in range(4)] == [0, 3, 6, 6]
