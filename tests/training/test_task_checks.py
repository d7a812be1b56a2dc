"""A task that gives something else for the same is found at the first step of a run, by its method;
so is a module that it needs and nobody has.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.errors import ConfigError
from distnadam.training.task_checks import difference, fingerprint
from tests.training.test_fit import Quadratic, train, weights


class Drawing(Quadratic):
    """Its batches come from one generator, whatever the step."""

    def init(self, seed: int) -> Any:
        self.draw = np.random.default_rng(seed)
        return super().init(seed)

    def batch(self, step: int, rank: int, world_size: int, micro_batch: int = 0) -> Any:
        return {"noise": [self.draw.standard_normal(3000).astype(np.float32)]}

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        return super().loss_and_gradients(params, batch["noise"][0])


class Dropping(Quadratic):
    """Writes its gradients into one array, with a dropout that no seed decides."""

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        self.out = getattr(self, "out", np.empty(3000, np.float32))
        self.out[:] = super().loss_and_gradients(params, batch)[1]["w"]
        self.out[7] += np.float32(os.urandom(1)[0] + 1) * np.float32(os.urandom(2)[0] + 1)
        return 0.5, {"w": self.out}


class Micro(Dropping):
    def batch(self, step: int, rank: int, world_size: int, micro_batch: int = 0) -> Any:
        return super().batch(step, rank, world_size)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Drawing, r"batch gives another batch .* \(in noise/0\)"),
        (Micro, r"loss_and_gradients gives something else .* \(in gradients/w\)"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_a_task_that_is_not_deterministic_ends_by_its_method(
    task: type[Quadratic], said: str, accumulate: int, tmp_path: Path
) -> None:
    where = "worker 0, step 0" + (", micro-batch 0" if accumulate > 1 else "")
    with pytest.raises(ConfigError, match=f"^{where}: {said}") as raised:
        train(tmp_path, 3, task(), accumulate=accumulate)
    assert "deterministic = False" in str(raised.value)
    assert not list(tmp_path.glob("step_*"))


def test_a_task_that_says_so_of_itself_is_trained(tmp_path: Path) -> None:
    class Knowing(Drawing):
        deterministic = False

    assert train(tmp_path, 3, Knowing()).steps == [1, 2, 3]


class Averaging(Quadratic):
    """Keeps an average of its batches, as BatchNorm does."""

    def init(self, seed: int) -> Any:
        self.mean = np.zeros(3000, np.float32)
        return super().init(seed)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        self.mean += np.float32(0.1) * (batch - self.mean)
        return super().loss_and_gradients(params, batch)

    def state(self) -> Any:
        return {"mean": self.mean}

    def load_state(self, state: Any) -> None:
        self.mean = np.array(state["mean"])


def test_the_look_leaves_a_tasks_own_state_as_one_step_does(tmp_path: Path) -> None:
    class NotLookedAt(Averaging):
        deterministic = False

    for task in (Averaging, NotLookedAt):
        train(tmp_path / task.__name__, 4, task(), num_workers=1)
    states = []
    for name in ("Averaging", "NotLookedAt"):
        with DistNadam.restore(tmp_path / name, backend="local") as optimizer:
            states.append(str(sorted(optimizer.restored_data.items())))
    assert states[0] == states[1]
    assert weights(tmp_path / "Averaging") == weights(tmp_path / "NotLookedAt")


def test_fingerprints_tell_bits_apart_and_stay_when_an_array_is_written() -> None:
    array = np.zeros(3, np.float32)
    once = fingerprint({"a": (array, 1.0, "x"), "b": float("nan")})
    assert difference(once, fingerprint({"a": (array, 1.0, "x"), "b": float("nan")})) is None
    array[1] = -0.0
    assert difference(once, fingerprint({"a": (array, 1.0, "x"), "b": float("nan")})) == " (in a/0)"
    assert difference(once, fingerprint({"a": (array, 1.0)})) == " (of another structure)"
    assert difference(fingerprint(object()), fingerprint(object())) is None, "it says nothing"


class Needing(Quadratic):
    """Imports what nobody has."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def _need(self, method: str) -> None:
        if method == self.method:
            import nobody_has_this  # noqa: F401

    def init(self, seed: int) -> Any:
        self._need("init")
        return super().init(seed)

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        self._need("batch")
        return super().batch(step, rank, world_size)

    def evaluate(self, params: Any) -> dict[str, float]:
        self._need("evaluate")
        return super().evaluate(params)


@pytest.mark.on_ray(slow=["ray-batch"])
@pytest.mark.parametrize(
    ("method", "where"),
    [("init", "init"), ("batch", "worker [01], step 0"), ("evaluate", "evaluate after step 2")],
    ids=["init", "batch", "evaluate"],
)
def test_a_module_that_is_missing_is_one_sentence_with_the_remedy(
    method: str, where: str, backend: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{where}: the task needs the module 'nobody_"
    ) as raised:
        train(tmp_path, 2, Needing(method), backend=backend)
    assert "install the package that has it, on every host" in str(raised.value)
    assert not hasattr(raised.value, "__notes__")
