"""Where metrics and plot are of a run whose checkpoints are at a URL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distnadam.errors import CheckpointError
from distnadam.training.history import History
from distnadam.training.metrics_file import read_metrics
from tests.training.test_fit import train
from tests.training.test_settings import Listener

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; nothing is in memory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def trained(steps: int, url: str = URL, **how: Any) -> tuple[History, list[str]]:
    listener = Listener()
    history = train(url, steps, callbacks=[listener], **how)
    return history, [text for text in listener.messages if "metrics.csv" in text]


def steps_of(history: History) -> list[int]:
    return [step for step, name, _ in read_metrics(history.metrics_path) if name == "loss"]


def test_a_resumed_run_goes_on_in_the_directory_that_it_had(here: Path) -> None:
    first, said = trained(2)
    assert said == [f"metrics.csv and loss.png are in {first.checkpoint_dir}"]
    other, _ = trained(3, "memory://bucket/other")
    for steps in (4, 6):
        again, said = trained(steps)
        assert again.checkpoint_dir == first.checkpoint_dir
        assert said == [f"metrics.csv and loss.png go on in {first.checkpoint_dir}"]
        assert steps_of(again) == [*range(1, steps + 1)]
        assert again.plot_path == first.plot_path
    assert steps_of(other) == [1, 2, 3]
    assert len(list((here / "runs").iterdir())) == 2


def test_a_run_that_is_not_resumed_has_a_new_directory(here: Path) -> None:
    first, _ = trained(2)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    second, _ = trained(3)
    assert second.checkpoint_dir != first.checkpoint_dir
    assert (steps_of(first), steps_of(second)) == ([1, 2], [1, 2, 3])
    third, _ = trained(4)
    assert third.checkpoint_dir == second.checkpoint_dir, "of two, the newest"
    with pytest.raises(CheckpointError, match="holds checkpoints"):
        trained(5, resume="never")
    assert steps_of(third) == [1, 2, 3, 4]


def test_a_run_that_is_resumed_elsewhere_says_that_earlier_rows_are_not_here(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(2)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    history, (said,) = trained(4)
    assert history.checkpoint_dir.is_relative_to(here / "elsewhere")
    assert said == (
        f"metrics.csv and loss.png are in {history.checkpoint_dir}, without the steps before: "
        "their rows are where the run was"
    )
    assert steps_of(history) == [3, 4]
