"""A process of a script finds its rank by what it is told, by Ray Train, or by its environment."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from distnadam.checks import check_name
from distnadam.errors import ConfigError
from distnadam.frontends.ranks import Place, find_place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job/7",
    "TORCHELASTIC_RESTART_COUNT": "1",
}


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ray.train", None)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def train(world_size: int | None) -> Any:
    """Ray Train as a process sees it; None: outside of a train function."""

    def context() -> Any:
        if world_size is None:
            raise RuntimeError("no train function runs here")
        return SimpleNamespace(
            get_world_rank=lambda: 1,
            get_world_size=lambda: world_size,
            get_local_rank=lambda: 0,
            get_local_world_size=lambda: 1,
            get_experiment_name=lambda: "my run",
        )

    return SimpleNamespace(get_context=context)


def test_a_process_of_its_own_is_the_only_rank() -> None:
    assert find_place() == find_place(num_workers=1) == find_place(0, 1) == Place()


def test_what_is_given_holds_whatever_the_environment_says(
    torchrun: pytest.MonkeyPatch,
) -> None:
    place = find_place(1, 2)
    assert (place.rank, place.num_workers, place.run) == (1, 2, None)


def test_torchrun_says_rank_size_and_what_all_ranks_call_the_run(
    torchrun: pytest.MonkeyPatch,
) -> None:
    place = find_place()
    assert (place.rank, place.num_workers, place.local_rank) == (3, 4, 1)
    assert place.run == "job-7-29500-1" and not place.is_one_host
    assert find_place(num_workers=4) == find_place(rank=3) == place
    torchrun.setenv("LOCAL_WORLD_SIZE", "4")
    assert find_place().is_one_host and find_place().run == f"job-7-29500-1-{os.getppid()}"
    torchrun.setenv("TORCHELASTIC_RUN_ID", "." * 9 + "x" * 90)
    assert check_name(f"{find_place().run}-0")


def test_ray_train_comes_before_the_environment_where_a_train_function_runs(
    torchrun: pytest.MonkeyPatch,
) -> None:
    torchrun.setitem(sys.modules, "ray.train", train(2))
    torchrun.setitem(sys.modules, "ray", None)
    place = find_place()
    assert (place.rank, place.num_workers, place.run) == (1, 2, "train-my-run-29500")
    assert place.ends_with_thread and not find_place(1, 2).ends_with_thread
    torchrun.delenv("MASTER_PORT")  # as trainers of other frameworks leave it
    group = SimpleNamespace(id=SimpleNamespace(hex=lambda: "5e" * 18))
    util = SimpleNamespace(get_current_placement_group=lambda: group)
    torchrun.setitem(sys.modules, "ray", SimpleNamespace(util=util))
    assert find_place().run == "train-my-run-5e5e5e5e5e5e"
    assert check_name(f"{find_place().run}-0")
    torchrun.setitem(sys.modules, "ray.train", train(None))
    assert find_place().rank == 3


@pytest.mark.parametrize(
    ("rank", "num_workers", "said"),
    [
        (1, None, "rank=1 needs num_workers too"),
        (None, 2, "num_workers=2 needs rank too"),
        (2, 2, r"rank must be in \[0, 2\), got 2"),
        (True, 2, "rank"),
        (0, 0, "num_workers"),
    ],
)
def test_what_names_no_rank_is_refused(rank: Any, num_workers: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_place(rank, num_workers)


def test_an_environment_that_says_otherwise_or_nonsense_is_refused(
    torchrun: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="num_workers=2, and this process is rank 3 of 4"):
        find_place(num_workers=2)
    for rank in ("4", "-1", "three"):
        torchrun.setenv("RANK", rank)
        with pytest.raises(ConfigError, match="name no rank"):
            find_place()
