"""State of a task that is no parameter: in checkpoints, before evaluations, after deaths."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, fit
from distnadam.checkpoint import store
from distnadam.errors import CheckpointError, ConfigError, TrainingError
from distnadam.training.history import History
from tests.training.test_fit import Quadratic, weights

STEPS = 8


class Averaging(Quadratic):
    """Keeps a running average of its batches, as BatchNorm does, and how many it has seen.

    At a step, a rank raises or is killed once, if there is a folder to note it in, after its state
    has changed.
    """

    name = "averaging"

    def __init__(self, fails: tuple[int, int] | None = None, notes: Path | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.notes = notes
        self.by_signal = False

    def init(self, seed: int) -> Any:
        self.average = np.zeros(4, np.float32)
        self.seen = np.zeros((), np.int64)
        return super().init(seed)

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        self.present = (rank, step)
        return super().batch(step, rank, world_size)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        self.average += np.float32(0.1) * (batch[:4] - self.average)
        self.seen += 1
        if self.present == self.fails and self.notes is not None:
            note = self.notes / "failed"
            if not note.exists():
                note.touch()
                if self.by_signal:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("once")
        return super().loss_and_gradients(params, batch)

    def state(self) -> Any:
        return {"average": self.average, "seen": (self.seen, "batches")}

    def load_state(self, state: Any) -> None:
        self.average = state["average"]
        self.seen, _ = state["seen"]

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"average": float(self.average[0]), "seen": float(self.seen)}


def train(directory: Path, task: Any = None, steps: int = STEPS, **how: Any) -> History:
    given = {"backend": "local", "checkpoint_dir": directory, "verbose": False} | how
    return fit(task or Averaging(), steps=steps, **given)


def kept(directory: Path) -> tuple[list[bytes], bytes, int]:
    """The bits of the parameters and of the task's state in the newest checkpoint."""
    _, manifest, _ = store.find(directory)
    state = manifest.user_data["task_state"]
    return weights(directory), state["average"].tobytes(), int(state["seen"][0])


def of_rank_0(steps: int) -> np.ndarray:
    alone = Averaging()
    params = alone.init(0)
    for step in range(steps):
        alone.loss_and_gradients(params, alone.batch(step, 0, 2))
    return alone.average


def test_an_evaluation_and_a_checkpoint_have_rank_0s_state(tmp_path: Path) -> None:
    task = Averaging()
    history = train(tmp_path, task, evaluate_every=3)
    assert [metrics["seen"] for _, metrics in history.evaluations] == [3, 6, 8]
    for step, metrics in history.evaluations:
        assert metrics["average"] == of_rank_0(step)[0]
    assert kept(tmp_path)[1:] == (of_rank_0(STEPS).tobytes(), STEPS)
    assert task.average.tobytes() == of_rank_0(STEPS).tobytes()


def test_a_resumed_run_goes_on_from_the_state_and_a_finished_one_evaluates_it(
    tmp_path: Path,
) -> None:
    train(tmp_path / "whole")
    for steps in (3, STEPS):
        train(tmp_path / "parts", steps=steps)
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    (tmp_path / "parts" / "metrics.csv").unlink()
    assert train(tmp_path / "parts").metrics["average"] == of_rank_0(STEPS)[0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("save_every", [3, None], ids=["from a checkpoint", "from the beginning"])
def test_a_rank_that_raises_changes_no_bit_of_the_state(
    tmp_path: Path, rank: int, save_every: int | None
) -> None:
    train(tmp_path / "calm")
    history = train(tmp_path / "a", Averaging((rank, 5), tmp_path), save_every=save_every)
    assert (tmp_path / "failed").exists()
    assert kept(tmp_path / "a") == kept(tmp_path / "calm")
    assert history.steps == list(range(1, STEPS + 1))
    assert history.recoveries == 1


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_worker_that_is_killed_changes_no_bit_of_the_state(tmp_path: Path, rank: int) -> None:
    train(tmp_path / "calm")
    task = Averaging((rank, 5), tmp_path)
    task.by_signal = True
    history = train(tmp_path / "a", task, save_every=3, backend="ray")
    assert (tmp_path / "failed").exists()
    assert kept(tmp_path / "a") == kept(tmp_path / "calm")
    assert history.recoveries == 1


def test_a_rank_that_raises_every_time_ends_the_run_with_its_error(tmp_path: Path) -> None:
    class Hopeless(Averaging):
        def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
            self.seen += 1
            if self.present == (1, 4):
                raise ZeroDivisionError("always")
            return super().loss_and_gradients(params, batch)

    with pytest.raises(TrainingError, match=r"worker 1, step 4: .* ZeroDivisionError: always"):
        train(tmp_path, Hopeless(), save_every=2)


def test_a_checkpoint_without_the_state_is_passed_over(tmp_path: Path) -> None:
    class Plain(Quadratic):
        name = "averaging"

    train(tmp_path, Plain(), steps=3)
    with pytest.raises(CheckpointError, match=r"holds no state of the task: it was saved from"):
        train(tmp_path)
    train(tmp_path / "b", steps=3)
    with pytest.raises(CheckpointError, match="which has no methods state and load_state now"):
        train(tmp_path / "b", Plain())
    with DistNadam.restore(tmp_path / "b", backend="local") as optimizer:
        optimizer.apply_gradients({"w": np.ones(3000, np.float32)})
        optimizer.save(tmp_path / "b")  # from outside: nobody here has the state
    train(tmp_path / "whole")
    train(tmp_path / "b")
    assert kept(tmp_path / "b") == kept(tmp_path / "whole")


def test_half_a_state_and_one_that_cannot_be_kept_are_refused_at_once(tmp_path: Path) -> None:
    class Half(Quadratic):
        def state(self) -> Any:
            return {}

    class Strange(Averaging):
        def state(self) -> Any:
            return {"average": object()}

    with pytest.raises(ConfigError, match="task: has state and not load_state"):
        train(tmp_path / "a", Half())
    with pytest.raises(ConfigError, match=r"data\['task_state'\]\['average'\]: expected"):
        train(tmp_path / "a", Strange())
    assert not (tmp_path / "a").exists()


class Module:
    """Looks like a torch module with buffers, of which one is not saved."""

    def named_buffers(self) -> Any:
        return iter([("norm.running_mean", np.zeros(2)), ("positions", np.arange(2))])

    def state_dict(self) -> Any:
        return {"norm.weight": np.ones(2), "norm.running_mean": np.zeros(2)}


class Careless(Quadratic):
    def init(self, seed: int) -> Any:
        self.models = {"student": Module()}
        return super().init(seed)


def test_a_task_that_keeps_buffers_and_says_nothing_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no parameter \(models\.norm\.running_mean\): no") as all:
        train(tmp_path, Careless(), steps=1)
    assert len([w for w in all if "no parameter" in str(w.message)]) == 1
    assert all[0].filename == __file__
