"""One run at a time writes to a directory, local or remote, while runs live, die and wake up."""

import fcntl
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from distnadam.checkpoint.run_lock import LeaseFile, is_held, make_run_lock
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import lock
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.errors import CheckpointBusy, CheckpointError

LEASE_S = 0.4


@pytest.fixture
def directory() -> Iterator[Directory]:
    yield open_directory("memory://claim/run")
    fsspec.filesystem("memory").store.clear()


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        make_run_lock(open_directory(tmp_path)),
        pytest.raises(CheckpointBusy, match=str(os.getpid())),
        make_run_lock(open_directory(tmp_path)),
    ):
        pass
    with make_run_lock(open_directory(tmp_path)):
        pass


def test_a_lock_that_was_removed_is_taken_anew_unless_another_run_has_it(tmp_path: Path) -> None:
    place = open_directory(tmp_path / "run")
    with make_run_lock(place) as first:
        shutil.rmtree(tmp_path / "run")
        first.check()
        with pytest.raises(CheckpointBusy, match=str(os.getpid())), make_run_lock(place):
            pass
        (tmp_path / "run" / ".lock").unlink()
        with make_run_lock(place):
            for _ in range(2):
                with pytest.raises(CheckpointBusy, match="another run writes here"):
                    first.check()
        first.check()
        with pytest.raises(CheckpointBusy), make_run_lock(place):
            pass


def test_whether_a_run_holds_a_directory_is_seen_and_the_look_keeps_no_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_held(tmp_path) is None
    with make_run_lock(open_directory(tmp_path)):
        assert is_held(tmp_path) is True
    assert is_held(tmp_path) is False
    look = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    monkeypatch.setattr("distnadam.checkpoint.run_lock.time.sleep", lambda _: os.close(look))
    with make_run_lock(open_directory(tmp_path)):
        assert is_held(tmp_path) is True


def test_a_directory_on_a_full_disk_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut, for other processes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with (
            pytest.raises(CheckpointError, match=r"run/.lock: cannot be written: File too large"),
            make_run_lock(open_directory(tmp_path / "run")),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with make_run_lock(open_directory(tmp_path / "run")):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_what_cannot_be_locked_is_not_said_to_be_held_by_another(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_PATH)  # refused, as by a file system without locks
    try:
        with pytest.raises(CheckpointError, match=r": cannot be locked: ") as refused:
            lock(descriptor, tmp_path)
    finally:
        os.close(descriptor)
    assert not isinstance(refused.value, CheckpointBusy)


def test_a_second_run_is_refused_by_name_while_the_first_lives(directory: Directory) -> None:
    with LeaseFile(directory, LEASE_S) as first:
        with (
            pytest.raises(
                CheckpointBusy,
                match=r"memory://claim/run: another run writes here \(process \d+ of .+\)",
            ),
            LeaseFile(directory, LEASE_S),
        ):
            pass
        first.check()
        assert len(directory.files()) == 1
    assert directory.files() == {}


def test_a_dead_run_is_outwaited(directory: Directory) -> None:
    first = LeaseFile(directory, LEASE_S).__enter__()
    first.stop_renewing()
    with LeaseFile(directory, LEASE_S) as second:
        second.check()
        assert len(directory.files()) == 1


def test_a_run_that_was_taken_over_stops_when_it_wakes_up(directory: Directory) -> None:
    first = LeaseFile(directory, LEASE_S).__enter__()
    first.stop_renewing()
    with LeaseFile(directory, LEASE_S) as second:
        first.renew()
        with pytest.raises(CheckpointBusy, match="another run took over"):
            first.check()
        second.check()


def test_one_of_the_runs_that_start_at_once_stays(directory: Directory) -> None:
    begun, held = threading.Barrier(4), []

    def start() -> None:
        begun.wait()
        with suppress(CheckpointBusy):
            held.append(LeaseFile(directory, LEASE_S).__enter__())

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(start) for _ in range(4)]:
            done.result()
    assert len(held) == 1
    assert len(directory.files()) == 1
    held[0].__exit__()


def test_a_lease_that_cannot_be_renewed_for_a_moment_is_kept(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LeaseFile(directory, LEASE_S) as lease:
        failed = threading.Event()

        def refuse(name: str, contents: bytes, *, temporary: str) -> None:
            monkeypatch.undo()
            failed.set()
            raise CheckpointError("not now")

        monkeypatch.setattr(directory, "replace", refuse)
        assert failed.wait(60)
        lease.check()
