"""Workers that ask Ray for GPUs: which each sees, and what is refused.

Ray counts two here, and gives them out without looking for them.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam, Options, fit
from distnadam.errors import ConfigError, InsufficientResources
from tests.training.test_fit import Quadratic
from tests.training.test_preflight import tried

pytestmark = pytest.mark.usefixtures("ray_cluster")
DIES_AT = 4


class Seeing(Quadratic):
    """Notes in a file, for each process of a rank, which GPUs it sees; one may die amid the run."""

    def __init__(self, directory: Path, dies: bool = False) -> None:
        super().__init__()
        self.directory, self.dies = directory, dies

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        (self.directory / str(os.getpid())).write_text(seen)
        return super().loss_and_gradients(params, batch)

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        last = self.directory / "died"
        if self.dies and rank == 1 and step == DIES_AT and not last.exists():
            last.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, rank, world_size)


def seen(tmp_path: Path, gpus: float, num_workers: int, dies: bool = False) -> list[str]:
    noted = tmp_path / "noted"
    noted.mkdir()
    options = Options(worker_gpus=gpus, shard_timeout_s=5.0)
    fit(
        Seeing(noted, dies),
        steps=8,
        num_workers=num_workers,
        optimizer=DistNadam(backend="ray", options=options),
        checkpoint_dir=tmp_path / "run",
        verbose=False,
    )
    return sorted(path.read_text() for path in noted.iterdir() if path.name != "died")


def test_each_rank_sees_a_gpu_of_its_own(tmp_path: Path) -> None:
    assert seen(tmp_path, 1, 2) == ["0", "1"]


def test_ranks_that_ask_for_half_a_gpu_share_one(tmp_path: Path) -> None:
    assert seen(tmp_path, 0.5, 4) == ["0", "0", "1", "1"]


def test_a_rank_that_asks_for_several_sees_them(tmp_path: Path) -> None:
    assert seen(tmp_path, 2, 1) == ["0,1"]


def test_a_rank_that_died_gets_its_gpu_again(tmp_path: Path) -> None:
    first, second, third = seen(tmp_path, 1, 2, dies=True)
    assert {first, second, third} == {"0", "1"}


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (Options(worker_gpus=2), "2 workers ask GPU 2 each, the nodes have 2 in all.*room for 1"),
        (Options(worker_cpus=64), "2 workers ask CPU 64 each, the nodes have 4 in all.*room for 0"),
        (
            Options(worker_cpus=2, shard_cpus=1),
            "CPU 2 each, the nodes have 4 in all and the shards take 2: .* no room for both",
        ),
        (Options(worker_label_selector={"zone": "moon"}), r"ask no resource: 0 suitable node\(s\)"),
    ],
)
def test_what_no_cluster_like_this_could_hold_is_refused_before_a_step(
    options: Options, missing: str, tmp_path: Path
) -> None:
    (tmp_path / "noted").mkdir()
    optimizer = DistNadam(backend="ray", options=options)
    with pytest.raises(InsufficientResources, match=missing):
        fit(
            Seeing(tmp_path / "noted"),
            steps=1,
            num_workers=2,
            optimizer=optimizer,
            checkpoint_dir=tmp_path / "run",
            verbose=False,
        )
    assert not list((tmp_path / "noted").iterdir())
    (problem,) = tried(tmp_path / "other", backend="ray", options=options).problems
    assert "workers ask" in problem


def test_more_than_one_gpu_is_a_whole_number() -> None:
    with pytest.raises(ConfigError, match=r"worker_gpus above 1 must be whole, got 1.5"):
        Options(worker_gpus=1.5)
