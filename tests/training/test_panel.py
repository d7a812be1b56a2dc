"""The panel is drawn whole at any width; shards are looked at no more often than it is drawn."""

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typing_extensions import override

from distnadam.client.status import Status
from distnadam.training.callbacks import Callback
from distnadam.training.panel import RunView, Trend, render
from distnadam.training.steps import Phases
from tests.training.test_callbacks import STATUS
from tests.training.test_fit import train

VIEW = RunView(
    "digits",
    step=431,
    steps=5000,
    loss=0.1234,
    trend=Trend(1 / step for step in range(1, 60)),
    steps_per_s=12.3,
    samples=64,
    phases=Phases(1e-3, 2e-4, 1e-5, 3e-4, 0.0),
    metrics={"accuracy": 0.99, "a_metric_of_a_rather_long_name": 3.2},
    evaluated=400,
    workers={0: "a-host-of-a-long-name", 1: "ホスト" * 9},
    status=replace(STATUS, awaited="the push of ranks 0, 1 to shard 0"),
    recoveries=3,
    last_recovery="worker 1, step 12",
)
SHOWN = ("0.1234", "a_metric_of_a_rather_long_name", "787samples/s", "apply0.30", "3recovered")


@pytest.mark.parametrize("in_colour", [True, False])
@pytest.mark.parametrize("width", [28, 40, 80, 120])
def test_a_panel_is_as_wide_as_its_terminal_and_loses_no_word(width: int, in_colour: bool) -> None:
    for view in (VIEW, replace(VIEW, steps_per_s=0.0), replace(VIEW, step=5000), RunView("empty")):
        lines = drawn(view, width, in_colour=in_colour)
        assert [cell_len(line) for line in lines] == [width] * len(lines)
    lines = drawn(VIEW, width, in_colour=in_colour)
    assert "431/5,000  8%" in lines[1]
    assert ("6 min 11 s left" in lines[1]) == (width >= 40), "what does not fit is left out whole"
    words = "".join(line[12:-1] for line in lines[2:-1]).replace(" ", "")
    for word in SHOWN:
        assert word in words, word
    assert any("apply 0.30" in line for line in lines), "a name and its figure are on one line"


def drawn(view: RunView, width: int, *, in_colour: bool) -> list[str]:
    """Return the lines of a panel, without their colours."""
    console = Console(width=width, color_system="truecolor" if in_colour else None)
    with console.capture() as text:
        console.print(render(view))
    return re.sub("\x1b\\[[0-9;]*m", "", text.get()).splitlines()


def test_segments_of_few_steps_are_not_all_looked_at(tmp_path: Path) -> None:
    class Count(Callback):
        looks = 0

        @override
        def on_status(self, status: Status, workers: Mapping[int, str]) -> None:
            self.looks += 1

    count, began = Count(), time.monotonic()
    train(tmp_path, 100, evaluate_every=1, callbacks=[count])
    assert 3 <= count.looks <= 23 + (time.monotonic() - began)
