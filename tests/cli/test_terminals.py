"""What commands print where the terminal is not UTF-8, the output is full or closed, or a number is
not finite.
"""

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.cli import group
from distnadam.errors import ArenaError
from distnadam.training.history import History
from distnadam.training.progress import ProgressDisplay
from distnadam.training.progress import console as make_console
from distnadam.training.steps import StepRecord
from distnadam.transport import available_memory, shared_memory

TASK = """
import numpy as np
class Lost:
    def init(self, seed): return {"w": np.full(2, 5, np.float32)}
    def batch(self, step, rank, world_size): return step
    def loss_and_gradients(self, params, batch): return float("nan"), {"w": 2 * params["w"]}
    def evaluate(self, params): return {"m": float("inf"), "n": -float("inf"), "o": 1.0}
"""


def command(args: str, directory: Path, shell: str = "", **environment: str) -> Any:
    line = f'"{sys.executable}" -m distnadam {args} {shell}'
    return subprocess.run(
        ["bash", "-c", line],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with DistNadam(backend="local").build({"重み": np.ones(3, np.float32)}) as optimizer:
        optimizer.save(tmp_path / "ck")
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_what_an_encoding_lacks_is_escaped(checkpoint: Path, encoding: str) -> None:
    shown = command("inspect ck", checkpoint, PYTHONIOENCODING=encoding)
    assert (shown.returncode, shown.stderr) == (0, b"")
    text = shown.stdout.decode(encoding)
    assert ("重み" if encoding == "utf-16" else r"\u91cd\u307f") in text


def test_a_full_output_is_one_sentence_and_status_1(checkpoint: Path) -> None:
    for args in ("inspect ck", "inspect ck --json", "--help", "doctor --json"):
        ended = command(args, checkpoint, ">/dev/full")
        assert ended.returncode == 1
        assert ended.stderr.decode().strip().splitlines() == [
            "distnadam: the system refused: No space left on device"
        ]


@pytest.mark.parametrize("shell", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full >/dev/null"])
def test_a_run_whose_output_nobody_takes_is_done_all_the_same(tmp_path: Path, shell: str) -> None:
    (tmp_path / "lost.py").write_text(TASK)
    args = "train lost.py:Lost --local --steps 2 --checkpoint-dir run"
    assert command(args, tmp_path, shell).returncode == 0
    assert command("verify run", tmp_path).returncode == 0


def test_what_a_task_leaves_unwritten_on_a_full_log_changes_no_status(tmp_path: Path) -> None:
    buffered = "import io, sys\nsys.stderr = io.TextIOWrapper(open(2, 'wb', closefd=False))\n"
    (tmp_path / "lost.py").write_text(buffered + "sys.stderr.write('mine')\n" + TASK)
    args = "train lost.py:Lost --local --steps 2 --checkpoint-dir run"
    assert command(args, tmp_path, "2>/dev/full >/dev/null").returncode == 0


def test_json_is_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(TASK)
    args = "train lost.py:Lost --local --steps 2 --checkpoint-dir run --json --quiet"
    ended = command(args, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(ended.stdout, parse_constant=refuse)
    assert (found["loss"], found["m"], found["n"], found["o"]) == (None, None, None, 1.0)


def test_numbers_deep_in_data_are_null_too(capsys: pytest.CaptureFixture[str]) -> None:
    group.echo_json({"a": [1.5, (float("nan"), {"b": float("inf")})], "c": np.float64("nan")})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, [None, {"b": None}]], "c": None}


def test_a_log_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # at its close
        monkeypatch.setattr(sys, "stderr", full)
        screen = make_console(verbose=True)
        assert screen is not None
        display = ProgressDisplay(screen, History(Path("run"), Path("run/metrics.csv")))
        display.on_begin(0, 2)
        display.on_message("saved")
        display.on_records([StepRecord(step=2, loss=0.5, lr=0.1, ranks=(0,))])
        display.on_end()
    monkeypatch.setattr(sys, "stderr", None)
    assert make_console(verbose=True) is None


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOSYS, errno.EPERM])
def test_no_shared_memory_is_an_arena_error(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ArenaError, match=os.strerror(code)):
        shared_memory.Arena.create({"float32": 1})


def test_what_is_available_is_known_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory.available_bytes() < sys.maxsize

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "hidden")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert available_memory.available_bytes() == sys.maxsize
