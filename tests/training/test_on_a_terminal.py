"""What a run shows on a terminal: one panel, and above it whole lines, whoever writes them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from distnadam.training.history import History
from distnadam.training.progress import ProgressDisplay
from tests.terminal import OnTerminal, Screen

TOP = "\u256d\u2500 run "
LONG = "http://127.0.0.1:40000/?token=" + "0123456789" * 4
PROGRAM = f"""
import logging, sys, time
from pathlib import Path
import numpy as np
from distnadam import fit
from distnadam.training.callbacks import Callback

class Task:
    def init(self, seed): return {{"w": np.full(4, 5, np.float32)}}
    def batch(self, step, rank, world_size): time.sleep(0.01)
    def loss_and_gradients(self, params, batch): return 1.0, dict(params)
    def evaluate(self, params): return {{}}

class Speaks(Callback):
    def on_begin(self, step, steps):
        self.run.say("dashboard: {LONG}")
        logging.getLogger("distnadam").warning("from another shell: {LONG}")

given = dict(num_workers=1, backend="local", checkpoint_dir="run", callbacks=[Speaks()])
fit(Task(), steps=int(sys.argv[1]), **given)
print("over")
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def test_what_is_said_beside_the_panel_stays_and_is_broken_by_the_terminal_alone(
    directory: Path,
) -> None:
    with OnTerminal(["program.py", "300"], directory, width=50) as terminal:
        status, screen = terminal.end()
    assert status == 0, screen
    joined = screen.replace("\n", "")
    assert f"dashboard: {LONG}" in joined
    assert f"from another shell: {LONG}" in joined
    assert screen.count(TOP) == 1, screen
    assert "\u256f\nover" in screen, "no empty line is left below the panel"


def test_ctrl_c_leaves_one_panel(directory: Path) -> None:
    with OnTerminal(["program.py", "1000000"], directory, width=60) as terminal:
        terminal.shows(lambda screen: "/1,000,000" in screen and "compute" in screen)
        terminal.type("\x03")
        status, screen = terminal.end()
    assert "saved step" in screen, screen
    assert status != 0
    assert screen.count(TOP) == 1, screen


@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ],
    ids=["dumb", "ascii"],
)
def test_a_terminal_that_cannot_show_the_panel_gets_lines(
    environment: dict[str, str], directory: Path
) -> None:
    with OnTerminal(["program.py", "40"], directory, **environment) as terminal:
        status, screen = terminal.end()
    assert status == 0, screen
    assert "step 40/40  loss 1" in screen, screen
    assert "+- run" not in screen and TOP not in screen and "\\u25" not in screen, screen


def test_a_run_that_ends_before_it_begins_leaves_no_empty_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=60, legacy_windows=False)
    display = ProgressDisplay(console, History(tmp_path / "run", tmp_path / "metrics.csv"))
    display.on_phase("starting Ray")
    display.on_message("the reason")
    display.on_end()
    screen = Screen(60)
    assert "starting Ray" in written.getvalue()
    screen.write(written.getvalue().replace("\n", "\r\n"))
    assert str(screen).strip() == "the reason"


def test_the_screen_of_these_tests_writes_as_a_terminal_does() -> None:
    screen = Screen(10)
    screen.write("one\r\ntwo\x1b[31m!\x1b[0m\r\x1b[1A\x1b[2Kuno\r\n")
    assert str(screen) == "uno\ntwo!"
    screen.write("x" * 12)
    assert str(screen) == "uno\n" + "x" * 10 + "\nxx"
