"""`fit` while real processes die: the same bits at the end, or an error if they die every time."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import fit
from distnadam.errors import TrainingError
from distnadam.training.metrics_file import read_metrics
from tests.training.test_fit import Quadratic, weights

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Dying(Quadratic):
    """Kills processes while a step is computed, once each: the rank's own, or a shard's."""

    def __init__(self, directory: Path, victims: dict[tuple[int, int], str]) -> None:
        super().__init__()
        self.directory = directory
        self.victims = victims

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        victim = self.victims.get((rank, step))
        if victim is not None and not (self.directory / f"{victim}-{step}.struck").exists():
            (self.directory / f"{victim}-{step}.struck").touch()
            os.kill(os.getpid() if victim.startswith("worker") else shard_process(), signal.SIGKILL)
        return super().batch(step, rank, world_size)


def shard_process() -> int:
    """Return the process id of a shard that this worker has a socket to: the socket's peer."""
    import gc
    import socket
    import struct

    from distnadam.transport.unix_connection import Connection

    connection = next(
        thing for thing in gc.get_objects() if type(thing) is Connection and thing.fileno() >= 0
    )
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        credentials = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])


@pytest.mark.nightly
def test_the_loss_of_more_ranks_at_once_than_one_may_fail_changes_no_bit(
    tmp_path: Path,
) -> None:
    train(Quadratic(), tmp_path / "undisturbed", backend="local", num_workers=6)
    (tmp_path / "struck").mkdir()
    task = Dying(tmp_path / "struck", {(rank, 5): f"worker {rank}" for rank in range(5)})
    task.name = Quadratic.name
    history = train(task, tmp_path / "disturbed", num_workers=6)
    assert history.recoveries == 5
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "undisturbed")


class Poisoned(Quadratic):
    """Its process dies whenever one step is computed."""

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if step == 3 and rank == 1:
            os._exit(7)
        return super().batch(step, rank, world_size)


def train(task: Any, directory: Path, **how: Any) -> Any:
    return fit(
        task,
        steps=30,
        checkpoint_dir=directory,
        save_every=7,
        verbose=False,
        **({"backend": "ray"} | how),
    )


@pytest.mark.parametrize(
    ("victims", "replicas"),
    [
        ({(1, 5): "worker", (0, 12): "shard"}, 0),
        pytest.param(
            {(1, 5): "worker", (1, 12): "shard", (0, 17): "worker"}, 0, marks=pytest.mark.nightly
        ),
        pytest.param({(0, 3): "shard"}, 0, marks=pytest.mark.nightly),
        pytest.param({(1, 12): "shard", (0, 20): "worker"}, 1, marks=pytest.mark.slow),
    ],
)
def test_workers_and_shards_that_die_under_fit_change_no_bit(
    victims: dict[tuple[int, int], str], replicas: int, tmp_path: Path
) -> None:
    undisturbed = train(Quadratic(), tmp_path / "undisturbed", backend="local")
    (tmp_path / "struck").mkdir()
    task = Dying(tmp_path / "struck", victims)
    task.name = Quadratic.name
    history = train(task, tmp_path / "disturbed", replicas=replicas)
    assert sorted(path.name for path in (tmp_path / "struck").iterdir()) == sorted(
        f"{v}-{s}.struck" for (_, s), v in victims.items()
    )
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "undisturbed")
    assert history.steps == undisturbed.steps == list(range(1, 31))
    check_losses(history, undisturbed)
    assert history.recoveries >= len(victims)
    assert [
        step for step, metric, _ in read_metrics(history.metrics_path) if metric == "loss"
    ] == list(range(1, 31))


def check_losses(history: Any, undisturbed: Any) -> None:
    """Check that each loss is the mean over all ranks, or says over which ones."""
    for loss, ranks, right in zip(history.losses, history.ranks, undisturbed.losses, strict=True):
        assert loss == right if ranks == (0, 1) else len(ranks) < 2
    assert sum(ranks == (0, 1) for ranks in history.ranks) >= len(history.ranks) // 2


@pytest.mark.nightly
def test_a_process_that_dies_at_one_step_every_time_ends_the_run(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        TrainingError,
        match=r"3 recoveries in a row after step 3 brought no new step; the last: WorkerLost: "
        r".*died",
    ):
        train(Poisoned(), tmp_path)


@pytest.mark.nightly
def test_a_task_that_raises_at_one_step_every_time_ends_the_run_with_its_traceback(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        TrainingError, match="worker 1, step 4: the task raised ZeroDivisionError: the batch is bad"
    ) as raised:
        train(Quadratic(fails_at=(1, 4)), tmp_path)
    notes = "\n".join(getattr(raised.value, "__notes__", ()))
    assert "Traceback" in notes + str(raised.value)
    assert 'raise ZeroDivisionError("the batch is bad")' in notes + str(raised.value)


@pytest.mark.nightly
def test_a_task_that_fails_twice_ends_with_the_bits_of_one_that_never_fails(
    tmp_path: Path,
) -> None:
    whole = train(Quadratic(), tmp_path / "whole", backend="local")
    (tmp_path / "failures").mkdir()
    moody = train(Moody(tmp_path / "failures"), tmp_path / "moody")
    assert (moody.steps, moody.losses) == (whole.steps, whole.losses)
    assert weights(tmp_path / "moody") == weights(tmp_path / "whole")


class Moody(Quadratic):
    """Raises twice at one step, in whichever process computes it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        failures = len(list(self.directory.iterdir()))
        if (rank, step) == (0, 6) and failures < 2:
            (self.directory / str(failures)).touch()
            raise ZeroDivisionError("this time")
        return np.asarray(super().batch(step, rank, world_size))
