"""The end of a process that listens is noticed at once, however it ends."""

import multiprocessing
import queue
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from distnadam.transport.process_watch import ProcessWatch
from distnadam.transport.unix_connection import Address, ConnectionServer

PATIENCE_S = 30.0


def listen(pipe: Any) -> None:
    """Listen, say where, and return when told to."""
    server = ConnectionServer(
        lambda connection, greeting, fds: ({}, []), lambda *_: None, lambda *_: None
    )
    pipe.send(server.address)
    pipe.recv()


class Listening:
    """A process that listens."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=listen, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.address: Address = self.pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@pytest.fixture
def listening() -> Iterator[Listening]:
    listening = Listening()
    yield listening
    listening.close()


@pytest.mark.parametrize("how", ["killed", "returned"])
def test_the_end_of_a_watched_process_is_reported_once(listening: Listening, how: str) -> None:
    ends: queue.Queue[str] = queue.Queue()
    watch = ProcessWatch()
    watch.add(listening.address, lambda: ends.put("ended"))
    assert ends.empty()
    if how == "killed":
        listening.process.kill()
    else:
        listening.pipe.send("return")
    assert ends.get(timeout=PATIENCE_S) == "ended"
    listening.process.join()
    assert ends.empty()


def test_a_process_that_cannot_be_reached_counts_as_ended(listening: Listening) -> None:
    listening.process.kill()
    listening.process.join()
    ends: queue.Queue[str] = queue.Queue()
    ProcessWatch().add(listening.address, lambda: ends.put("ended"))
    assert ends.get_nowait() == "ended"


def test_one_watch_tells_processes_apart(listening: Listening) -> None:
    other, ends = Listening(), queue.Queue[str]()
    watch = ProcessWatch()
    watch.add(listening.address, lambda: ends.put("first"))
    watch.add(other.address, lambda: ends.put("second"))
    other.close()
    assert ends.get(timeout=PATIENCE_S) == "second"
    assert ends.empty()
