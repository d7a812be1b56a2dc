"""Each rank has a copy of the task of its own, as `init` left it, in local mode too."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from distnadam import DistNadam, Options, fit
from distnadam.errors import ConfigError, TrainingError
from distnadam.training.callbacks import Callback
from tests.training.test_fit import Quadratic, Remembering, train, weights


def by_hand(steps: int, num_workers: int) -> Any:
    """Train copies of a task, one per rank, in one thread; return losses and parameters."""
    tasks = [Remembering() for _ in range(num_workers)]
    params = Remembering().init(0)
    for task in tasks:
        task.init(0)
    losses = []
    with DistNadam(backend="local").build(params) as optimizer:
        for step in range(steps):
            params = optimizer.get_params()
            each = [
                task.loss_and_gradients(params, task.batch(step, rank, num_workers))
                for rank, task in enumerate(tasks)
            ]
            losses.append(sum(loss for loss, _ in each) / num_workers)
            total = np.zeros(3000, np.float32)
            for _, gradients in each:
                total += gradients["w"]
            optimizer.apply_gradients({"w": total / np.float32(num_workers)})
        return losses, optimizer.get_params()["w"].tobytes()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_what_a_rank_keeps_on_the_task_is_its_own(num_workers: int, tmp_path: Path) -> None:
    task = Remembering()
    history = train(tmp_path, 12, task=task, num_workers=num_workers)
    losses, params = by_hand(12, num_workers)
    assert history.losses == losses
    assert weights(tmp_path)[0] == params
    assert task.seen == [], "the caller's own trains nothing"


class Counting(Quadratic):
    """Notes how many threads the numerical libraries compute with."""

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        _, gradients = super().loss_and_gradients(params, batch)
        return float(num_threads()), gradients


def num_threads() -> int:
    return max(int(library["num_threads"]) for library in threadpool_info())


@pytest.mark.parametrize(("cpus", "threads"), [(0.0, 1), (0.5, 1), (2.0, 2)])
def test_a_rank_computes_with_as_many_threads_as_on_ray(
    cpus: float, threads: int, tmp_path: Path
) -> None:
    optimizer = DistNadam(backend="local", options=Options(worker_cpus=cpus))
    with threadpool_limits(3):
        history = train(tmp_path, 2, task=Counting(), optimizer=optimizer)
        assert num_threads() == 3, "the caller's are what they were"
    assert history.losses == [threads] * 2


class Evaluated(Remembering):
    """Its evaluation changes what training would read."""

    def evaluate(self, params: Any) -> dict[str, float]:
        self.mean += 100
        self.best = params["w"]
        return super().evaluate(params)


def test_what_evaluate_changes_no_rank_sees_and_the_caller_keeps(tmp_path: Path) -> None:
    task = Evaluated()
    train(tmp_path / "often", 12, task=task, evaluate_every=2)
    train(tmp_path / "never", 12, task=Remembering())
    assert weights(tmp_path / "often") == weights(tmp_path / "never")
    assert task.best.tobytes() == weights(tmp_path / "often")[0]


class Locked(Quadratic):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_task_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"task 'quadratic': cannot be copied, .*_thread\.lock.*first used"
    ):
        train(tmp_path, task=Locked())


class OnceBroken(Remembering):
    """Raises once, in the middle of a segment, before or after it has computed."""

    def __init__(self, directory: Path, at: tuple[int, int]) -> None:
        super().__init__()
        self.directory = directory
        self.at = at

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        struck = self.directory / "struck"
        if (rank, step) == self.at and not struck.exists():
            struck.touch()
            raise ZeroDivisionError("this time")
        return super().batch(step, rank, world_size)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("step", [0, 2, 5, 6])
def test_a_task_that_raised_once_leaves_no_gap_in_the_record(
    num_workers: int, step: int, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", 10, task=Remembering(), num_workers=num_workers)
    task = OnceBroken(tmp_path, (num_workers - 1, step))
    history = train(tmp_path / "broken", 10, task=task, num_workers=num_workers)
    assert (history.steps, history.losses, history.ranks, history.learning_rates) == (
        whole.steps,
        whole.losses,
        whole.ranks,
        whole.learning_rates,
    )
    assert history.recoveries == 1


class Failing(Callback):
    """Raises at an event of step 3."""

    def __init__(self, event: str) -> None:
        self._event = event

    def _fail(self, event: str, step: int) -> None:
        if event == self._event and step == 3:
            raise RuntimeError("the disk of the dashboard is full")

    def on_step(self, step: int, loss: float) -> None:
        self._fail("on_step", step)

    def on_evaluate(self, step: int, metrics: Any) -> None:
        self._fail("on_evaluate", step)

    def on_save(self, step: int, path: Any) -> None:
        self._fail("on_save", step)


@pytest.mark.parametrize("event", ["on_step", "on_evaluate", "on_save"])
def test_a_callback_that_raises_ends_the_run_with_what_was_reached_saved(
    event: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"save_every": 3, "evaluate_every": 3}
    with pytest.raises(TrainingError, match=rf"callback Failing\.{event}, step 3: it raised Run"):
        train(tmp_path / "parts", 60, callbacks=[Failing(event)], **how)
    history = train(tmp_path / "parts", 60, **how)
    assert 3 <= history.steps[0] - 1 < 60
    train(tmp_path / "whole", 60, **how)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_callback_that_raises_at_the_end_ends_the_run_with_its_error(tmp_path: Path) -> None:
    class Late(Callback):
        def on_end(self) -> None:
            raise RuntimeError("too late")

    with pytest.raises(TrainingError, match=r"callback Late\.on_end: it raised RuntimeError"):
        fit(
            Quadratic(),
            steps=3,
            backend="local",
            checkpoint_dir=tmp_path,
            callbacks=[Late()],
            verbose=False,
        )
    assert (tmp_path / "step_00000003").is_dir()
