"""Ranks of a host find the Ray of rank 0 by a file that only their user can read."""

import atexit
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from distnadam import waiting
from distnadam.backends import factory
from distnadam.config import Options
from distnadam.errors import ClusterError, ConfigError, StepTimeout
from distnadam.frontends import meeting
from distnadam.frontends.ranks import Place

HERE = Place(rank=1, num_workers=2, run="run-1")
WAY = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "secret"}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(factory, "how_to_join", lambda: WAY)
    monkeypatch.setattr(factory, "can_join", lambda: False)
    return tmp_path


def test_a_name_is_of_the_run_and_of_the_order_in_which_optimizers_are_made() -> None:
    assert meeting.name_for(Place(), None) is None
    assert meeting.name_for(HERE, "mine") == "mine"
    first, second = (meeting.name_for(HERE, None) for _ in range(2))
    assert first is not None and second is not None
    assert first != second and first.startswith("run-1-") and second.startswith("run-1-")
    with pytest.raises(ConfigError, match="num_workers=2 needs name: the ranks find each other"):
        meeting.name_for(Place(rank=1, num_workers=2), None)


def test_what_rank_0_announces_only_its_user_can_read(temporary: Path) -> None:
    meeting.announce(HERE, "run-1-0")
    (directory,) = temporary.iterdir()
    (file,) = directory.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert meeting._read(file) == WAY
    meeting.withdraw(HERE, "run-1-0")
    meeting.withdraw(HERE, "run-1-0")
    assert list(directory.iterdir()) == []


def test_what_a_killed_rank_0_has_announced_counts_no_more(temporary: Path) -> None:
    meeting.announce(HERE, "run-1-0")
    (file,) = meeting._directory().iterdir()
    meeting._announced.pop("run-1-0").close()  # as the end of the process does
    assert file.exists() and meeting._read(file) is None
    meeting.announce(HERE, "run-1-0")  # the next start
    assert meeting._read(file) == WAY
    meeting.withdraw(HERE, "run-1-0")
    assert meeting._read(file) is None


def test_what_has_no_name_of_the_user_s_ends_with_rank_0() -> None:
    options = Options(step_timeout_s=7.0)
    assert meeting.lasting(options, is_named=True) is options
    assert meeting.lasting(options, is_named=False) == Options(step_timeout_s=7.0, outlives=False)


def test_a_directory_that_others_can_use_is_refused(temporary: Path) -> None:
    meeting._directory().chmod(0o755)
    with pytest.raises(ClusterError, match="must be a directory that only this user can use"):
        meeting.announce(HERE, "run-1-0")


def test_a_file_that_cannot_be_written_is_named_with_what_to_do(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (meeting._directory() / "run-1-0").mkdir()
    with pytest.raises(ClusterError, match=r"run-1-0: cannot be written: .* set TMPDIR"):
        meeting.announce(HERE, "run-1-0")
    assert [path.name for path in meeting._directory().iterdir()] == ["run-1-0"]
    (temporary / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "file"))
    for way in (meeting.announce, lambda *which: meeting.attach(*which, 0.2)):
        with pytest.raises(ClusterError, match=r"file/distnadam-.*: cannot be made: .* set TMPDIR"):
            way(HERE, "run-1-0")


def test_a_rank_waits_for_rank_0_as_long_as_a_step_may_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "REPORT_WAIT_S", 0.05)
    with pytest.raises(StepTimeout, match=r"rank 1: rank 0 has not built 'run-1-0' in 0\.2 s"):
        meeting.attach(HERE, "run-1-0", 0.2)
    assert "rank 1: has waited 0.05 s, for rank 0 to build 'run-1-0'; it waits on" in caplog.text


def test_ranks_of_several_hosts_need_the_address_of_a_ray() -> None:
    apart = Place(rank=1, num_workers=2, run="run-1", is_one_host=False)
    with pytest.raises(ClusterError, match="set RAY_ADDRESS to its address for all ranks"):
        meeting.attach(apart, "run-1-0", 0.2)


def test_a_rank_whose_part_is_a_thread_leaves_when_that_ends() -> None:
    begun, may_end, left, named = (threading.Event() for _ in range(4))

    def train() -> None:
        meeting.close_at_end(Place(ends_with_thread=True), left.set, is_named=False)
        meeting.close_at_end(Place(ends_with_thread=True), named.set, is_named=True)
        begun.set()
        may_end.wait(60)

    thread = threading.Thread(target=train)
    thread.start()
    assert begun.wait(60) and not left.is_set()
    may_end.set()
    assert left.wait(60)
    thread.join()
    assert not named.is_set()  # to which the ranks may come back
    atexit.unregister(left.set)
    atexit.unregister(named.set)
