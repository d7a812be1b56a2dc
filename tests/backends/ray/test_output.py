"""Lines of Ray's processes on their way to the terminal, and Ray's own reports to their file."""

from pathlib import Path
from typing import Any

import pytest

from distnadam.backends.ray.output import Output


def lines(*said: str, actor: str = "distnadam Worker 1", pid: str = "7", **more: Any) -> Any:
    """What Ray's log monitor sends."""
    return {
        "ip": "10.0.0.2",
        "pid": pid,
        "is_err": False,
        "actor_name": actor,
        "task_name": "",
        "lines": list(said),
    } | more


def test_each_line_says_who_said_it_and_on_which_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output(tmp_path / "reports")
    output.take(lines("one", "", "two [b]"))
    output.take(lines("a warning", actor="distnadam run-3 Shard 0", is_err=True))
    output.take(lines("a task of the user's", actor="", task_name="load"))
    output.take(lines("nobody knows", actor=""))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "worker 1 on 10.0.0.2: one",
        "worker 1 on 10.0.0.2: ",
        "worker 1 on 10.0.0.2: two [b]",
        "load on 10.0.0.2: a task of the user's",
        "process 7 on 10.0.0.2: nobody knows",
    ]
    assert err == "run-3 shard 0 on 10.0.0.2: a warning\n"


def test_reports_of_ray_are_kept_in_a_file_that_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output(tmp_path / "reports")
    output.take(lines("an autoscaler's tick", actor="", pid="autoscaler"))
    assert not (tmp_path / "reports").exists(), "Ray's own logs have it"
    output.keep(["A worker died.\nA wall of text."])
    output.keep(["Another died."])
    assert (tmp_path / "reports").read_text().count("died.") == 2
    named = f"distnadam: what Ray reports of its processes is in {tmp_path / 'reports'}\n"
    assert capsys.readouterr() == ("", named)


def test_a_terminal_or_file_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path / "gone" / "reports")
    output.keep(["A worker died."])
    closed = (tmp_path / "closed").open("w", encoding="utf-8")
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr("sys.stdout", stream)
        output.take(lines("one"))
    monkeypatch.undo()
