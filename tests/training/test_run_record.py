"""What a run records of itself: where the time of its steps goes, and what happens beside them."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam
from distnadam.errors import LifecycleError, TrainingError
from distnadam.report.data import read_run
from distnadam.training.callbacks import Callback
from distnadam.training.metrics_file import read_steps
from distnadam.training.run_record import NAME, read_events
from distnadam.training.steps import UNKNOWN, Phases, RankStep, StepRecord
from tests.training.test_fit import Quadratic, train

SLOW_S = 0.02


class Uneven(Quadratic):
    """Rank 1 computes long."""

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        return super().loss_and_gradients(params, batch)

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if rank == 1:
            time.sleep(SLOW_S)
        return super().batch(step, rank, world_size)


def events_of(directory: Path, event: str | None = None) -> list[dict[str, Any]]:
    return [each for each in read_events(directory / NAME) if event in (None, each["event"])]


@pytest.mark.on_ray
def test_the_phases_of_a_step_say_who_waits_for_whom(tmp_path: Path, backend: str) -> None:
    history = train(tmp_path, 12, Uneven(), backend=backend)
    assert len(history.phases) == 12
    late = history.phases[2:]  # by then the shards have been asked how long they step
    mean = Phases(*(sum(column) / len(late) for column in zip(*late, strict=True)))
    assert all(each >= 0 for phases in late for each in phases)
    assert mean.compute >= SLOW_S / 2, "the mean of a rank that sleeps and one that does not"
    assert mean.wait >= 0.3 * SLOW_S, "rank 0 waits for rank 1, which waits for nobody"
    assert 0 < mean.apply < mean.total
    assert SLOW_S / 2 <= mean.total <= history.step_seconds / len(late)
    read = read_steps(tmp_path / "metrics.csv")
    assert read.steps == history.steps
    assert read.losses == history.losses
    assert read.rates == history.learning_rates
    assert [tuple(each) for each in read.phases] == [
        pytest.approx(tuple(each), abs=1e-7) for each in history.phases
    ]


def test_phases_add_up_to_the_mean_of_the_ranks_times_whatever_the_shards_say() -> None:
    seen = {0: RankStep(1.0, 0.1, 2.0, 0.5, 1.5), 1: RankStep(2.0, 0.1, 1.0, 0.5, 2.5)}
    assert StepRecord.of(1, seen, 0.5).phases == Phases(1.5, 0.5, 0.5, 0.5, 1.0)
    assert StepRecord.of(1, seen, 9.0).phases == Phases(1.5, 0.5, 0.5, 1.5, 0.0)
    seen[1] = RankStep(2.0, None)  # its end was not seen
    assert StepRecord.of(1, seen, 0.5).phases == Phases(2.0, 0.5, 0.0, 0.5, 1.0)
    assert all(map(math.isnan, StepRecord.of(1, {}, 0.5).phases))
    assert all(map(math.isnan, UNKNOWN))


def test_a_run_records_its_configuration_hosts_checkpoints_and_end(tmp_path: Path) -> None:
    optimizer = DistNadam(lr=0.1, beta_2=0.99)
    train(tmp_path, 20, optimizer=optimizer, save_every=10, seed=3)
    names = [each["event"] for each in events_of(tmp_path)]
    assert names[:3] == ["start", "begin", "hosts"]
    assert names[-1] == "end"
    start, (end,) = events_of(tmp_path)[0], events_of(tmp_path, "end")
    assert start["task"] == "quadratic"
    assert start["task_at"] == "tests.training.test_fit:Quadratic"
    assert start["configuration"]["beta_2"] == 0.99
    assert start["configuration"]["seed"] == 3
    assert start["configuration"]["options"] == {}, "only what is not as by default"
    assert {"distnadam", "numpy"} <= start["versions"].keys()
    assert (end["step"], end["outcome"]) == (20, "finished")
    saved = events_of(tmp_path, "checkpoint")
    assert [each["step"] for each in saved] == [10, 20]
    for each in saved:
        files = Path(each["path"]).glob("*.safetensors")
        assert each["bytes"] == sum(file.stat().st_size for file in files) > 12 * 3000
    hosts = events_of(tmp_path, "hosts")[0]
    assert [each["rank"] for each in hosts["workers"]] == [0, 1]
    assert sum(each["bytes"] for each in hosts["shards"]) == 4 * 4 * 3000


def test_a_recovery_is_recorded_with_who_and_when(tmp_path: Path) -> None:
    class FailsOnce(Quadratic):
        def batch(self, step: int, rank: int, world_size: int) -> Any:
            if step == 7 and rank == 1 and not hasattr(self, "failed"):
                self.failed = True
                raise ZeroDivisionError("the batch is bad")
            return super().batch(step, rank, world_size)

    train(tmp_path, 20, FailsOnce())
    (recovery,) = events_of(tmp_path, "recovery")
    assert recovery["who"] == "worker 1"
    assert "worker 1, step 7: the task raised ZeroDivisionError" in recovery["text"]
    assert 0 <= recovery["step"] <= 7


def test_a_run_that_fails_says_so_and_a_resumed_one_goes_on_in_the_same_record(
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingError, match="worker 0, step 5"):
        train(tmp_path, 20, Quadratic(fails_at=(0, 5)), save_every=2)
    assert events_of(tmp_path, "end")[-1]["outcome"].startswith("failed: TrainingError: worker 0")
    train(tmp_path, 20)
    first, second = events_of(tmp_path, "start")
    assert first["resumed_from"] is None
    assert second["resumed_from"].endswith("step_00000004")
    assert events_of(tmp_path, "begin")[-1]["step"] == 4
    with (tmp_path / NAME).open("a") as file:
        file.write('{"event": "sto')  # of a run that was killed
    assert events_of(tmp_path)[-1]["event"] == "end"
    for line in (tmp_path / NAME).read_text().splitlines()[:-1]:
        assert json.loads(line)["time"] > 0


class Stopping(Callback):
    """Stops the run at an evaluation, and sets its rate at another."""

    def __init__(self) -> None:
        self.refused: str | None = None

    def on_step(self, step: int, loss: float) -> None:
        if step == 1:
            try:
                self.run.optimizer.lr = 0.5
            except LifecycleError as error:
                self.refused = str(error)

    def on_evaluate(self, step: int, metrics: Any) -> None:
        assert self.run.optimizer.iterations == step
        if step == 4:
            self.run.optimizer.lr = 0.25
        if step == 8:
            self.run.stop("it is good enough")


@pytest.mark.on_ray
def test_a_callback_sees_the_optimizer_sets_its_rate_and_stops_the_run(
    tmp_path: Path, backend: str
) -> None:
    callback = Stopping()
    history = train(tmp_path, 20, evaluate_every=4, callbacks=[callback], backend=backend)
    assert history.outcome == "stopped: it is good enough"
    assert history.steps[-1] == 8
    assert history.learning_rates == [0.002] * 4 + [0.25] * 4
    assert "do it in on_begin or on_evaluate" in (callback.refused or "")
    assert [Path(path).name for path in history.checkpoints] == ["step_00000008"]
    assert history.plot_path is not None
    with pytest.raises(LifecycleError, match="no optimizer yet, or no longer"):
        _ = callback.run.optimizer
    assert train(tmp_path, 20, backend=backend).steps == list(range(9, 21))


def test_a_line_that_was_damaged_is_left_out(tmp_path: Path) -> None:
    train(tmp_path, 6, save_every=3, evaluate_every=3)
    path = tmp_path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    whole = read_events(path)
    path.write_bytes(b"".join([lines[0], b"[" * 100_000 + b"\n", *lines[1:]]))
    assert read_events(path) == whole
    for damage in [(b'"step"', b'"stop"'), (b'"path"', b'"bath"'), (b'": ', b'": "')]:
        damaged = [line.replace(*damage) for line in lines]
        for index in range(1, len(lines)):
            path.write_bytes(b"".join([*lines[:index], damaged[index], *lines[index + 1 :]]))
            assert len(read_events(path)) >= len(whole) - 1
            assert read_run(tmp_path, verify=False)["reached"] == 6
