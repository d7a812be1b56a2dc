"""The parent of a run that starts a Ray: begins it anew if Ray itself died, and only then."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distnadam.cli.restarting import MAX_RESTARTS
from tests.processes import children, wait_until_gone

pytestmark = pytest.mark.timeout(120)

PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from distnadam.cli.restarting import in_child
from distnadam.errors import RayLost

def lose(step):
    try:
        raise RayLost("all said", "run", step) from RayLost("Ray itself died")
    except RayLost as error:
        run.end(error)

def say(*words):
    print(*words, flush=True)

run = in_child()
say("child", run.goes_on_in)
begun = len(Path("begun").read_text()) + 1 if run.goes_on_in else 1
Path("begun").write_text("*" * begun)
{body}
"""


def start(body: str, directory: Path) -> subprocess.Popen[str]:
    program = PROGRAM.format(body=textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def said_by(process: subprocess.Popen[str], line: str) -> None:
    """Wait for a line of output."""
    assert process.stdout is not None
    assert line in iter(process.stdout.readline, ""), process.communicate()[1]


def test_a_run_whose_ray_died_begins_anew_where_it_was_and_ends_as_its_last(tmp_path: Path) -> None:
    process = start("lose(begun) if begun < 3 else sys.exit(7)", tmp_path)
    out, err = process.communicate()
    assert out.splitlines() == ["child None", "child run", "child run"]
    assert err.splitlines() == [
        f"distnadam: Ray itself died; step {step} is saved in run: the run goes on from there in a "
        "new Ray"
        for step in (1, 2)
    ]
    assert process.returncode == 7


def test_a_run_whose_new_ray_dies_while_it_starts_goes_on_where_it_was(tmp_path: Path) -> None:
    body = """
    if begun == 2:
        error = RayLost("before the run knows its directory")
        error.__cause__ = RayLost("Ray itself died")
        run.end(error)
    lose(1) if begun == 1 else None
    """
    process = start(body, tmp_path)
    out, err = process.communicate()
    assert out.splitlines() == ["child None", "child run", "child run"]
    assert [line.partition(": the run")[0] for line in err.splitlines()] == [
        "distnadam: Ray itself died; step 1 is saved in run",
        "distnadam: Ray itself died; no step is saved yet",
    ]
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("sys.exit(1)", 1),
        ("sys.exit(75)", 75),
        ("raise ValueError", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_whatever_else_ends_a_run_ends_it_with_its_status(
    tmp_path: Path, body: str, status: int
) -> None:
    process = start(body, tmp_path)
    out, _ = process.communicate()
    assert (out, process.returncode) == ("child None\n", status)


def test_a_run_that_saves_nothing_new_between_deaths_ends(tmp_path: Path) -> None:
    process = start("lose(5 if begun > 2 else -1)", tmp_path)
    out, err = process.communicate()
    # two that saved nothing, the first that saved, and the restarts after it
    assert out.count("child") == 2 + 1 + MAX_RESTARTS
    assert "no step is saved yet in run" in err
    assert err.splitlines()[-1] == (
        f"distnadam: Ray itself died; step 5 is saved in run; {MAX_RESTARTS} restarts in a row "
        "brought no new checkpoint, and it ends"
    )
    assert process.returncode == os.EX_TEMPFAIL


def test_what_a_lost_ray_left_is_gone_before_the_run_begins_anew(tmp_path: Path) -> None:
    body = """
    if begun == 1:
        sleep = subprocess.Popen(["sleep", "600"], start_new_session=True)
        os.kill(sleep.pid, signal.SIGSTOP)
        Path("left").write_text(str(sleep.pid))
        lose(1)
    say("left:", Path("/proc", Path("left").read_text()).exists())
    """
    out, err = start(body, tmp_path).communicate()
    assert out.splitlines()[-1] == "left: False", err


COUNTING = """
count = 0
def note(number, frame):
    global count
    count += 1
    say("got", number, "as", count)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
say("ready")
while count < 2:
    time.sleep(0.01)
sys.exit(9)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_for_the_command_reaches_the_run(tmp_path: Path, number: signal.Signals) -> None:
    process = start(COUNTING, tmp_path)
    said_by(process, "ready\n")
    for count in (1, 2):
        process.send_signal(number)
        said_by(process, f"got {number:d} as {count}\n")
    process.communicate()
    assert process.returncode == 9


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_ends_ends_the_command_as_a_shell_says_it(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    body = """
    say("ready")
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(130)
    """
    process = start(body, tmp_path)
    said_by(process, "ready\n")
    process.send_signal(number)
    process.communicate()
    assert process.returncode == status


INTERRUPTED = """
count = 0
while True:
    try:
        say("ready", count)
        time.sleep(600)
    except KeyboardInterrupt:
        count += 1
"""


def test_ctrl_c_for_the_whole_group_counts_once_and_a_second_one_counts(tmp_path: Path) -> None:
    process = start(INTERRUPTED, tmp_path)
    said_by(process, "ready 0\n")
    os.killpg(process.pid, signal.SIGINT)
    said_by(process, "ready 1\n")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)  # the one that was passed on has come too
    process.send_signal(signal.SIGINT)
    said_by(process, "ready 2\n")
    process.kill()
    process.communicate()


def test_a_run_that_is_told_to_stop_does_not_begin_anew(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, lambda number, frame: lose(4))
    say("ready")
    time.sleep(600)
    """
    process = start(body, tmp_path)
    said_by(process, "ready\n")
    process.terminate()
    out, err = process.communicate()
    assert (out, process.returncode) == ("", os.EX_TEMPFAIL)
    assert "step 4 is saved in run; the run was told to stop, and it ends" in err


def test_no_process_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    process = start("say('ready'); time.sleep(600)", tmp_path)
    said_by(process, "ready\n")
    below = children(process.pid)
    assert len(below) == 1
    process.kill()
    process.communicate()
    wait_until_gone(below)


def test_the_parent_has_no_ray(tmp_path: Path) -> None:
    body = """
    import ray
    maps = Path(f"/proc/{os.getppid()}/maps").read_text(), Path("/proc/self/maps").read_text()
    say(*["_raylet" in each for each in maps])
    """
    assert start(body, tmp_path).communicate()[0].splitlines()[-1] == "False True"


def test_a_program_that_calls_the_command_is_not_forked(tmp_path: Path) -> None:
    body = """
    from distnadam.cli import main, training
    training.in_child = lambda: say("forked") or sys.exit(3)
    for given in (None, ["train", "nothing"]):
        sys.argv = ["distnadam", "train", "nothing"]
        try:
            main(given)
        except SystemExit as ended:
            say(ended.code)
    """
    program = textwrap.dedent(body).replace("say(", "print(")
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + program],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["forked", "3", "2"], done.stderr
