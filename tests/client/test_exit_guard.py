"""What the end of a process waits for, and which failures it reports."""

import pytest

from distnadam.client.checkpointing import SaveHandle
from distnadam.client.exit_guard import ExitGuard
from distnadam.errors import CheckpointError


def test_a_save_that_another_overtakes_is_still_waited_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    guard, slow, quick = ExitGuard(), SaveHandle(1), SaveHandle(2)
    guard.watch(slow)
    guard.watch(quick)  # of another optimizer
    quick.complete("step_2")
    slow.fail(CheckpointError("the disk is full"))
    guard.finish()
    assert capsys.readouterr().err == "distnadam: a background save failed: the disk is full\n"


def test_saves_that_succeeded_are_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    guard, first, second = ExitGuard(), SaveHandle(1), SaveHandle(2)
    guard.watch(first)
    first.complete("step_1")
    guard.watch(second)
    second.complete("step_2")
    guard.finish()
    guard.end()  # goes on: nothing failed
    assert capsys.readouterr().err == ""
