"""A run with a Ray of its own, as a child of this process, which begins it anew if that Ray dies.

Ray ends the processes that have joined it when its head dies, so the parent has none. It passes
signals on, ends as its last child ends, and takes the child along if it is killed itself.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.cli.group import leave
from distnadam.errors import RayLost
from distnadam.places import shown
from distnadam.threads import start
from distnadam.training.resuming import with_what_is_saved

MAX_RESTARTS = 3
"""Restarts in a row without a new checkpoint, before the run fails."""
_STOP = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_PASSED_ON = (*_STOP, signal.SIGUSR1, signal.SIGUSR2)
_SENT_BY_TERMINAL = 0x80
"""The `si_code` SI_KERNEL: the terminal sent the signal to the child too."""
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""
_AT_ONCE_S = 0.2
_LOOK_EVERY_S = 1.0
_CLEANUP_S = 10.0


class ChildRun:
    """What a child knows of its parent.

    Args:
        report: a pipe to the parent.
        goes_on_in: the directory of the run that the parent begins anew; None at first.
    """

    def __init__(self, report: int, goes_on_in: str | None) -> None:
        self._report = report
        self._ending = threading.Lock()
        self.goes_on_in = goes_on_in

    def end(self, error: RayLost) -> NoReturn:
        """End this process, whose Ray died, and have the parent begin the run anew."""
        self._ending.acquire()  # for good: one report
        record = {"said": saved(error), "in": error.checkpoint_dir, "step": error.step}
        os.write(self._report, json.dumps(record).encode())
        leave()


def end_if_stuck(end: Callable[[RayLost], NoReturn], directory: Callable[[], str | None]) -> None:
    """End this process if its Ray died while it starts, or while the run is in a long evaluation or
    in a call that hangs; Ray itself would end it some time later, with 1.

    Args:
        end: ends it.
        directory: returns where checkpoints are, or would be, as far as it is known.
    """
    start(threading.Thread(target=_look, args=(end, directory), daemon=True))


def _look(end: Callable[[RayLost], NoReturn], directory: Callable[[], str | None]) -> None:
    while (lost := _why_lost()) is None:
        time.sleep(_LOOK_EVERY_S)
    why, left_s = lost
    time.sleep(left_s)
    where = directory()
    error = RayLost("", where)
    if where is not None:
        error = with_what_is_saved(error, open_directory(where))
    error.__cause__ = why
    end(error)


def _why_lost() -> tuple[RayLost, float] | None:
    """Return how the Ray that this process has joined died, and the seconds in which the run itself
    may notice it, without importing Ray.
    """
    joined = sys.modules.get("distnadam.backends.ray.joined")
    if joined is None or not hasattr(joined, "ray_lost"):  # it is being imported
        return None
    end = joined.why_lost(now=False) or joined.why_lost_while_starting()
    return (joined.ray_lost(end), joined.notice_s()) if end is not None else None


def saved(error: RayLost) -> str:
    """Return what happened to a run, and what is saved of it."""
    newest = "no step is saved yet"
    if error.step >= 0:
        newest = f"step {error.step} is saved"
    where = f" in {shown(error.checkpoint_dir)}" if error.checkpoint_dir is not None else ""
    return f"{error.__cause__}; {newest}{where}"


def in_child() -> ChildRun:
    """Return in a child of the calling process, which itself ends with the last child's status."""
    heeded = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
    heeded.add(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, heeded)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    parent, goes_on_in, newest, in_vain = os.getpid(), None, -1, -1
    while True:
        reports, report = os.pipe()
        child = os.fork()
        if child == 0:
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before
                os._exit(128 + signal.SIGKILL)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, _Interrupts())
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(reports)
            return ChildRun(report, goes_on_in)
        os.close(report)
        status, told_to_stop = _watch(child, heeded)
        lost = _read(reports)
        if lost is None:
            sys.exit(status)
        in_vain = 0 if lost["step"] > newest else in_vain + 1
        goes_on_in, newest = lost["in"] or goes_on_in, max(newest, lost["step"])
        if told_to_stop or in_vain >= MAX_RESTARTS:
            why = "the run was told to stop"
            if in_vain >= MAX_RESTARTS:
                why = f"{MAX_RESTARTS} restarts in a row brought no new checkpoint"
            click.echo(f"distnadam: {lost['said']}; {why}, and it ends", err=True)
            sys.exit(status)
        _end_children()
        click.echo(f"distnadam: {lost['said']}: the run goes on from there in a new Ray", err=True)


class _Interrupts:
    """Raises KeyboardInterrupt, and once for a SIGINT that was sent to the whole group and, by the
    parent, passed on.
    """

    def __init__(self) -> None:
        self._last = -_AT_ONCE_S

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before, self._last = self._last, time.monotonic()
        if self._last - before >= _AT_ONCE_S:
            signal.default_int_handler(number, frame)


def _watch(child: int, heeded: set[signal.Signals]) -> tuple[int, bool]:
    """Pass signals on until the child ends; return its exit status as a shell says it, and whether
    it was told to stop.
    """
    told_to_stop = False
    while True:
        came = signal.sigwaitinfo(heeded)
        if came.si_signo != signal.SIGCHLD:
            told_to_stop = told_to_stop or came.si_signo in _STOP
            if came.si_code != _SENT_BY_TERMINAL:
                os.kill(child, came.si_signo)
            continue
        for pid, status in iter(_ended_child, None):
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return (code if code >= 0 else 128 - code), told_to_stop


def _ended_child() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _read(reports: int) -> dict[str, Any] | None:
    """Return what the child reported, if anything; others may still hold the pipe's other end."""
    os.set_blocking(reports, False)
    with os.fdopen(reports, "rb") as pipe:
        record = pipe.read()
    return json.loads(record) if record else None


def _end_children() -> None:
    """Kill what the child's Ray left: orphans below this process become its own children."""
    deadline = time.monotonic() + _CLEANUP_S
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        while _ended_child() is not None:
            pass


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
