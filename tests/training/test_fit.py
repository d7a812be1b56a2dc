"""`fit`: segments, records, resuming, refusals, errors of the task, and cleaning up."""

import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, fit
from distnadam.checkpoint import store
from distnadam.checkpoint.run_lock import make_run_lock
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.errors import CheckpointBusy, CheckpointError, ConfigError, TrainingError
from distnadam.interop import import_checkpoint
from distnadam.report.data import read_run
from distnadam.training.callbacks import Callback
from distnadam.training.metrics_file import read_metrics
from distnadam.training.plot import plot_loss
from distnadam.training.run_directory import claim_run_directory
from distnadam.training.run_record import read_events
from distnadam.training.tasks.digits import Digits


class Quadratic:
    """Fit a vector to a target; the batch is noise from (seed, step, rank, world size)."""

    name = "quadratic"

    def __init__(self, fails_at: tuple[int, int] | None = None) -> None:
        self.fails_at = fails_at

    def init(self, seed: int) -> Any:
        self.seed = seed
        return {"w": np.zeros(3000, np.float32)}

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if (rank, step) == self.fails_at:
            raise ZeroDivisionError("the batch is bad")
        return (
            np.random.default_rng([self.seed, step, rank, world_size])
            .standard_normal(3000)
            .astype(np.float32)
        )

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        error = params["w"] - 1 + np.float32(0.1) * batch
        return float((error**2).mean()), {"w": error}

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"distance": float(np.abs(params["w"] - 1).max())}


class Remembering(Quadratic):
    """Keeps what it has seen in arrays and lists on itself, and trains on that."""

    deterministic = False

    def init(self, seed: int) -> Any:
        self.mean = np.zeros(3000, np.float32)
        self.seen: list[float] = []
        return super().init(seed)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        self.mean += np.float32(0.1) * (batch - self.mean)
        self.seen.append(float(self.mean[0]))
        error = params["w"] - 1 + self.mean + np.float32(sum(self.seen))
        return float((error**2).mean()), {"w": error}


def weights(directory: Path) -> list[bytes]:
    with DistNadam.restore(directory, num_shards=1, backend="local") as optimizer:
        return [
            optimizer.get_params()["w"].tobytes(),
            *(np.asarray(x).tobytes() for x in optimizer.get_weights()),
        ]


def train(directory: Path, steps: int = 20, task: Any = None, **how: Any) -> Any:
    return fit(
        task or Quadratic(),
        **(
            {"steps": steps, "backend": "local", "checkpoint_dir": directory, "verbose": False}
            | how
        ),
    )


class InMicroBatches(Quadratic):
    """A batch may come in `parts`, whose mean it is; one of them raises once, the second time."""

    def __init__(self, parts: int, fails_at: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.parts, self.fails = parts, fails_at

    def batch(self, step: int, rank: int, world_size: int, micro_batch: int | None = None) -> Any:
        each = np.random.default_rng([self.seed, step, rank, world_size]).integers(
            -8, 9, (self.parts, 3000)
        )
        if micro_batch is None:
            return each.sum(0, dtype=np.float32)
        if self.fails == (step, rank, micro_batch):
            self.fails = None
            raise ZeroDivisionError("the batch is bad")
        return self.parts * each[micro_batch].astype(np.float32)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        return float(batch.sum()), {"w": batch}  # of which sums and means are exact


@pytest.mark.on_ray
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_train_as_the_batch_that_they_are_parts_of(
    tmp_path: Path, parts: int, backend: str
) -> None:
    whole = train(tmp_path / "whole", 6, InMicroBatches(parts))
    task = InMicroBatches(parts, fails_at=(3, 1, 1))
    history = train(tmp_path / "parts", 6, task, accumulate=parts, backend=backend)
    assert history.recoveries == 1, "what the rank had summed when its task raised is not in it"
    assert history.losses == whole.losses
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_run_goes_on_with_as_many_micro_batches_as_it_began_with(tmp_path: Path) -> None:
    train(tmp_path, 2, InMicroBatches(2), accumulate=2)
    for other in (1, 4):
        with pytest.raises(ConfigError, match=f"accumulate={other}: the run of .* has 2, and its"):
            train(tmp_path, 4, InMicroBatches(2), accumulate=other)
    assert train(tmp_path, 4, InMicroBatches(2), accumulate=2).steps == [3, 4]


def test_a_task_that_takes_no_micro_batches_is_refused_before_anything_begins(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"accumulate=2: task 'quadratic' must take each micro-batch's number, as in "
        r"batch\(step, rank, world_size, micro_batch=0\); it has batch\(step",
    ):
        train(tmp_path / "run", accumulate=2)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="accumulate"):
        train(tmp_path / "run", accumulate=0)


def test_micro_batches_of_another_shape_are_named_with_their_place(tmp_path: Path) -> None:
    class Wrong(InMicroBatches):
        def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
            return 0.0, {"w": batch[:-1]}

    with pytest.raises(TrainingError, match=r"worker [01], step 0, micro-batch 0: .*'w'"):
        train(tmp_path, 2, Wrong(2), accumulate=2)


def test_a_run_leaves_its_record_metrics_plot_and_checkpoints(tmp_path: Path) -> None:
    # earlier tests may have dropped optimizers without closing them
    before = set(threading.enumerate())
    history = train(tmp_path, save_every=5, keep=2, evaluate_every=8)
    assert history.steps == list(range(1, 21))
    assert history.losses[-1] < history.losses[0]
    assert [step for step, _ in history.evaluations] == [8, 16, 20]
    assert [path.name for path in store.step_directories(tmp_path)] == [
        "step_00000015",
        "step_00000020",
    ]
    rows = read_metrics(history.metrics_path)
    assert [value for _, metric, value in rows if metric == "loss"] == history.losses
    assert history.plot_path == tmp_path / "loss.png"
    assert history.plot_path.read_bytes().startswith(b"\x89PNG")
    assert not [
        t
        for t in set(threading.enumerate()) - before
        if t.name.startswith(("worker", "nadam-kernel"))
    ]


def test_the_loss_is_the_mean_over_the_ranks(tmp_path: Path) -> None:
    task = Quadratic()
    params = task.init(0)
    each = [task.loss_and_gradients(params, task.batch(0, rank, 3))[0] for rank in range(3)]
    assert train(tmp_path, steps=1, num_workers=3).losses == [sum(each) / 3]


@pytest.mark.parametrize(
    "how",
    [
        {"num_shards": 1},
        {"num_shards": 5},
        pytest.param({"backend": "ray"}, marks=pytest.mark.nightly),
    ],
)
def test_the_run_does_not_depend_on_shards_or_backend(
    how: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if how.get("backend") == "ray":
        request.getfixturevalue("ray_cluster")
    reference = train(tmp_path / "a", task=Remembering())
    other = train(tmp_path / "b", task=Remembering(), **how)
    assert other.losses == reference.losses
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.on_ray
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_resumed_run_ends_as_the_undisturbed_one(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if backend == "ray":
        request.getfixturevalue("ray_cluster")
    train(tmp_path / "whole", evaluate_every=10)
    train(tmp_path / "parts", steps=10, evaluate_every=10)
    history = train(tmp_path / "parts", evaluate_every=10, backend=backend)
    assert history.steps == list(range(11, 21))
    assert history.resumed_from == tmp_path / "parts" / "step_00000010"
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert read_metrics(tmp_path / "whole" / "metrics.csv") == read_metrics(
        tmp_path / "parts" / "metrics.csv"
    )


def test_rows_of_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    train(tmp_path, steps=10)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("11,loss,99.0\n12,lo")
    train(tmp_path)
    losses = [
        (step, value)
        for step, metric, value in read_metrics(tmp_path / "metrics.csv")
        if metric == "loss"
    ]
    assert [step for step, _ in losses] == list(range(1, 21))
    assert (11, 99.0) not in losses


def test_a_broken_newest_checkpoint_is_passed_over_with_a_message(tmp_path: Path) -> None:
    train(tmp_path, steps=10, save_every=5)
    victim = next((tmp_path / "step_00000010").glob("shard-00000-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    messages: list[str] = []

    class Listener(Callback):
        def on_message(self, text: str) -> None:
            messages.append(text)

    history = train(tmp_path, callbacks=[Listener()])
    assert history.resumed_from == tmp_path / "step_00000005"
    assert victim.name in messages[0]


def test_a_changed_number_of_workers_is_reported_and_another_seed_or_task_refused(
    tmp_path: Path,
) -> None:
    train(tmp_path, steps=10)
    messages: list[str] = []

    class Listener(Callback):
        def on_message(self, text: str) -> None:
            messages.append(text)

    with pytest.raises(CheckpointError, match="seed 0, this run's is 1"):
        train(tmp_path, seed=1)
    train(tmp_path, num_workers=3, callbacks=[Listener()])
    assert any("had 2 workers and goes on with 3" in text for text in messages)
    other = Quadratic()
    other.name = "other"
    with pytest.raises(CheckpointError, match="task 'quadratic', this run's is 'other'"):
        fit(other, steps=30, backend="local", checkpoint_dir=tmp_path, verbose=False)


def test_resume_may_be_forbidden_or_demanded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        train(tmp_path, resume="must")
    train(tmp_path, resume="never")
    with pytest.raises(CheckpointError, match="holds checkpoints"):
        train(tmp_path, resume="never")
    with pytest.raises(ConfigError, match="resume must be"):
        train(tmp_path, resume="maybe")


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with (
        make_run_lock(open_directory(tmp_path)),
        pytest.raises(CheckpointBusy, match=f"{tmp_path.name}.*another run writes here"),
    ):
        train(tmp_path)


def test_metrics_that_another_file_has_replaced_are_kept_and_go_on_in_it(tmp_path: Path) -> None:
    class Edited(Callback):
        def on_save(self, step: int, saved: Path | str) -> None:
            if step == 8:  # as an editor saves, or `sed -i`
                path, copy = tmp_path / "metrics.csv", tmp_path / "copy"
                shutil.copy(path, copy)
                copy.replace(path)

    train(tmp_path, steps=20, save_every=4, callbacks=[Edited()])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,") and not any(line.startswith("step,") for line in lines[1:])
    steps = {step for step, *_ in read_metrics(tmp_path / "metrics.csv")}
    assert steps >= {*range(1, 9), *range(17, 21)}  # some between went to the other file


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_run_whose_directory_goes_away_goes_on_in_a_new_one(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"

    class Away(Callback):
        def on_save(self, step: int, saved: Path | str) -> None:
            if step == 8:  # and no other save is being written
                path.rename(tmp_path / "other")
                if how == "removed":
                    shutil.rmtree(tmp_path / "other")

    train(path, steps=20, save_every=4, callbacks=[Away()])
    assert "was removed or moved while this run writes there" in caplog.text
    assert {step for step, *_ in read_metrics(path / "metrics.csv")} >= {17, 18, 19, 20}
    assert read_events(path / "events.jsonl")[0]["event"] == "start"
    assert (path / ".lock").exists()
    train(tmp_path / "whole", steps=20)
    assert weights(path) == weights(tmp_path / "whole")


def test_pruning_keeps_the_newest_checkpoint_though_a_broken_one_has_a_higher_step(
    tmp_path: Path,
) -> None:
    train(tmp_path, steps=20, save_every=5)
    victim = next((tmp_path / "step_00000020").glob("shard-00000-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    seen: list[bool] = []

    class Listener(Callback):
        def on_save(self, step: int, path: Path) -> None:
            seen.append(bool(store.verify(path)))

    history = train(tmp_path, steps=24, save_every=3, keep=1, callbacks=[Listener()])
    assert history.resumed_from == tmp_path / "step_00000015"
    assert seen == [True] * 3
    assert str(store.find(tmp_path)[0]) == str(tmp_path / "step_00000024")


def test_a_rate_that_no_checkpoint_can_hold_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="is a plain function, which a checkpoint cannot store"):
        train(tmp_path, optimizer=DistNadam(lr=lambda step: 0.1))


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("loss_and_gradients", None, "worker 0, step 0: the task raised TypeError"),
        (
            "loss_and_gradients",
            ("abc", {"w": np.zeros(3000)}),
            "worker 0, step 0: the task raised ValueError",
        ),
        (
            "loss_and_gradients",
            (1.0, {"x": np.zeros(3000)}),
            "worker 0, step 0: worker 0: gradients: 'w' is missing, 'x' is not a tensor",
        ),
        ("evaluate", None, "evaluate after step 3: expected a dict of numbers by name, got None"),
        ("evaluate", {"accuracy": "high"}, "evaluate after step 3: accuracy: expected a number"),
    ],
)
def test_a_bad_result_of_the_task_is_an_error_with_worker_and_step(
    method: str, result: Any, message: str, tmp_path: Path
) -> None:
    task = Quadratic()
    setattr(task, method, lambda *args: result)
    with pytest.raises(TrainingError, match=message):
        fit(task, steps=3, num_workers=1, backend="local", checkpoint_dir=tmp_path, verbose=False)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be made or written"):
        train(tmp_path / "file")
    with pytest.raises(ConfigError, match="task must have init"):
        fit(None, steps=3, checkpoint_dir=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["d" * 300, "/".join(["d" * 200] * 30)])
def test_a_path_that_is_too_long_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    refusals = [
        (CheckpointError, lambda: train(path)),
        (CheckpointError, lambda: import_checkpoint(path, tmp_path / "out", source_format="torch")),
        (TrainingError, lambda: plot_loss(path, tmp_path / "loss.png")),
        (TrainingError, lambda: read_run(path)),
    ]
    for error, call in refusals:
        with pytest.raises(error, match=re.escape(str(path))):
            call()


def test_ctrl_c_while_the_driver_evaluates_saves_too(tmp_path: Path) -> None:
    class Interrupted(Quadratic):
        def evaluate(self, params: Any) -> dict[str, float]:
            signal.raise_signal(signal.SIGINT)
            return {}

    with pytest.raises(KeyboardInterrupt):
        fit(
            Interrupted(),
            steps=20,
            evaluate_every=5,
            backend="local",
            checkpoint_dir=tmp_path,
            verbose=False,
        )
    train(tmp_path / "whole", steps=5)
    assert weights(tmp_path / "step_00000005") == weights(tmp_path / "whole")


@pytest.mark.on_ray
def test_an_error_of_the_task_names_rank_and_step_and_ends_the_run(
    tmp_path: Path, backend: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(
        TrainingError, match="worker 1, step 7: the task raised ZeroDivisionError: the batch is bad"
    ) as caught:
        fit(
            Quadratic(fails_at=(1, 7)),
            steps=20,
            backend=backend,
            checkpoint_dir=tmp_path,
            verbose=False,
        )
    assert any("in batch" in note for note in caught.value.__notes__)
    with make_run_lock(open_directory(tmp_path)):  # fit has released its own
        assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("worker")]


def test_the_optimizer_given_is_a_template_for_its_hyper_parameters(tmp_path: Path) -> None:
    history = train(tmp_path, steps=1, optimizer=DistNadam(lr=0.5, clipvalue=0.1))
    manifest = store.load(history.checkpoints[0])
    assert (manifest.config["lr"], manifest.config["clipvalue"]) == (0.5, 0.1)


def test_runs_of_one_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    runs = [
        fit(Digits(), steps=1, optimizer=DistNadam(lr=lr), backend="local", verbose=False)
        for lr in (0.1, 0.2, 0.3)
    ]
    first = tmp_path / "runs" / "digits-20260101-000000"
    assert [run.checkpoint_dir for run in runs] == [
        first,
        first.with_name(f"{first.name}-2"),
        first.with_name(f"{first.name}-3"),
    ]
    assert [(run.steps, run.resumed_from) for run in runs] == [([1], None)] * 3


def test_the_name_of_a_task_makes_a_legal_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for label in ("x" * 300, "../..", "", "a/b\0名"):
        path = claim_run_directory(label)
        assert path.parent == tmp_path / "runs"
        assert path.is_dir()


def test_a_run_without_a_directory_has_nothing_that_it_must_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match='resume="must" needs checkpoint_dir'):
        fit(Digits(), steps=1, backend="local", resume="must")
    assert list(tmp_path.iterdir()) == []
