"""One run at a time in a folder, here or at a URL, whoever lives, dies, or wakes up."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

import distnadam.checkpoint.run_lock as claims
from distnadam.checkpoint.run_lock import LeaseFile, claim
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import place
from distnadam.errors import CheckpointBusy

LEASE_S = 0.4


@pytest.fixture
def folder() -> Iterator[Directory]:
    yield place("memory://claim/run")
    fsspec.filesystem("memory").store.clear()


def die(lease: LeaseFile) -> None:
    """Let a lease be as its process's death leaves it."""
    lease._ended.set()
    lease._thread.join()


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        claim(place(tmp_path)),
        pytest.raises(CheckpointBusy, match=str(os.getpid())),
        claim(place(tmp_path)),
    ):
        pass
    with claim(place(tmp_path)):
        pass


def test_a_second_run_is_refused_by_name_while_the_first_lives(folder: Directory) -> None:
    with LeaseFile(folder, LEASE_S) as first:
        with (
            pytest.raises(
                CheckpointBusy,
                match=r"memory://claim/run: another run writes here \(process \d+ of .+\)",
            ),
            LeaseFile(folder, LEASE_S),
        ):
            pass
        first.check()
        assert len(folder.files()) == 1
    assert folder.files() == {}


def test_a_dead_run_is_outwaited(folder: Directory) -> None:
    first = LeaseFile(folder, LEASE_S).__enter__()
    die(first)
    with LeaseFile(folder, LEASE_S) as second:
        second.check()
        assert len(folder.files()) == 1


def test_a_run_that_was_taken_over_from_is_told_when_it_wakes_up(folder: Directory) -> None:
    first = LeaseFile(folder, LEASE_S).__enter__()
    die(first)
    with LeaseFile(folder, LEASE_S) as second:
        first._ended.clear()
        first._keep()
        with pytest.raises(CheckpointBusy, match="another run took over"):
            first.check()
        second.check()


def test_of_runs_that_start_at_once_one_stays(folder: Directory) -> None:
    begun, held = threading.Barrier(4), []

    def start() -> None:
        begun.wait()
        with suppress(CheckpointBusy):
            held.append(LeaseFile(folder, LEASE_S).__enter__())

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(start) for _ in range(4)]:
            done.result()
    assert len(held) == 1
    assert len(folder.files()) == 1
    held[0].__exit__()


def test_a_lease_that_cannot_be_renewed_for_a_moment_is_kept(
    folder: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LeaseFile(folder, LEASE_S) as lease:
        failed = threading.Event()

        def refuse(phase: str) -> None:
            monkeypatch.undo()
            failed.set()
            raise claims.CheckpointError("not now")

        monkeypatch.setattr(lease, "_rewrite", refuse)
        assert failed.wait(60)
        lease.check()
