"""Parameters in this process: pages that cannot be written, and a copy for each side of a fork."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.transport import parameter_memory
from distnadam.transport.parameter_memory import ParameterMemory
from tests.models import bits

WRITE = """
import ctypes, sys
import numpy as np
from distnadam import DistNadam
ones = {"w": np.ones(5000, np.float32)}
with DistNadam(backend="local", num_shards=2).build(ones) as optimizer:
    with optimizer.worker(0) as worker:
        for get in (worker.pull, lambda: worker.step(ones), worker.parameters):
            tree = get()
            assert not tree["w"].flags.writeable
        before = optimizer.get_params()["w"].copy()
        print("before the write", flush=True)
        ctypes.memset(tree["w"].ctypes.data, 0, 4)  # as a library that ignores NumPy's flags
        print("written", np.array_equal(optimizer.get_params()["w"], before), flush=True)
"""


def test_a_write_through_a_view_cannot_reach_the_shards() -> None:
    done = subprocess.run([sys.executable, "-c", WRITE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "before the write\n"
    assert done.returncode == -signal.SIGSEGV


def test_where_there_is_no_such_memory_the_worker_has_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    ones = {"w": np.ones(5000, np.float32), "half": np.ones(3, np.float16)}

    def train(*, may_write: bool) -> list[bytes]:
        with DistNadam(backend="local", num_shards=2, num_workers=2).build(ones) as optimizer:
            workers = [optimizer.worker(rank) for rank in range(2)]
            for step in range(3):
                tickets = [w.push({k: v * (step + 1) for k, v in ones.items()}) for w in workers]
                assert [ticket.result() for ticket in tickets] == [step + 1] * 2
                seen = workers[0].pull()["w"]
                assert np.array_equal(seen, optimizer.get_params()["w"])
                assert np.array_equal(workers[1].pull()["w"], seen)
                if may_write:
                    before = bits(optimizer)
                    ctypes.memset(seen.ctypes.data, 0, seen.nbytes)
                    assert bits(optimizer) == before
            return bits(optimizer)

    expected = train(may_write=False)
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert ParameterMemory({"float32": 5}).read is None
    assert train(may_write=True) == expected


def enter(memory: ParameterMemory, token: object) -> None:
    memory.inside.add(token)
    if memory.forks != memory.settled:
        memory.settle(token)


def in_child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_parent_and_child_have_parameters_of_their_own_after_a_fork() -> None:
    memory = ParameterMemory({"float32": 3000, "float64": 5})
    assert memory.read is not None
    (written, _), (read, _) = memory.written, memory.read
    for space in written:
        written[space][:] = 1.0
    told, tell = os.pipe()

    def child() -> bool:
        os.read(told, 1)  # once the parent has written
        inherited = all((each == 1.0).all() for each in read.values())
        enter(memory, child)
        written["float32"][:] = 3.0
        memory.inside.discard(child)
        return inherited and bool((read["float32"] == 3.0).all() and (read["float64"] == 1.0).all())

    pid = in_child(child)
    address = written["float32"].ctypes.data
    enter(memory, None)
    written["float32"][:] = 2.0
    memory.inside.discard(None)
    os.write(tell, b"x")
    assert status_of(pid) == 0
    assert (read["float32"] == 2.0).all()
    assert (read["float64"] == 1.0).all()
    assert written["float32"].ctypes.data == address
    os.close(told)
    os.close(tell)


def test_a_move_waits_for_whoever_wrote_before_the_fork() -> None:
    memory = ParameterMemory({"float32": 1})
    enter(memory, "a step of another thread")
    assert status_of(in_child(lambda: enter(memory, "child") is None)) == 0  # waits for no thread
    entered = threading.Event()

    def step() -> None:
        enter(memory, "next")
        entered.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not entered.wait(10 * parameter_memory._POLL_S)
    memory.inside.discard("a step of another thread")
    assert entered.wait(60)
    thread.join()


def test_a_child_goes_on_from_its_fork_while_the_parent_steps_on() -> None:
    ones = {"w": np.ones(200_000, np.float32)}
    told, tell = os.pipe()
    with (
        DistNadam(backend="local", num_shards=2).build(ones) as optimizer,
        DistNadam(backend="local").build(ones) as undisturbed,
    ):
        worker = optimizer.worker(0)
        for each in (optimizer, undisturbed):
            each.apply_gradients(ones)
        seen = worker.pull()["w"]
        before = seen.copy()
        pids = []
        for _ in range(2):

            def child() -> bool:
                os.read(told, 1)
                same = np.array_equal(seen, before)
                worker.step(ones)
                undisturbed.apply_gradients(ones)
                return same and bits(optimizer) == bits(undisturbed)

            pids.append(in_child(child))
        for _ in range(3):
            worker.step(ones)
        os.write(tell, b"xx")
        assert [status_of(pid) for pid in pids] == [0, 0]
        for _ in range(3):
            undisturbed.apply_gradients(ones)
        assert bits(optimizer) == bits(undisturbed)
    os.close(told)
    os.close(tell)


def test_memory_that_is_shared_is_a_forked_child_s_own_at_once() -> None:
    memory = ParameterMemory({"float32": 3000, "float64": 5})
    address = memory.written[1]["float32"].ctypes.data
    memory.written[1]["float32"][:] = 1.0
    memory.share(1)
    assert memory.read is not None
    seen = memory.read[1]["float32"]
    assert (seen == 1.0).all()
    assert seen.ctypes.data == address
    seen[:] = 2.0
    assert (memory.written[1]["float32"] == 2.0).all()
    to_child, to_parent = os.pipe(), os.pipe()

    def child() -> bool:
        seen[:] = 3.0
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)  # once the parent has written
        return bool((seen == 3.0).all())

    pid = in_child(child)
    os.read(to_parent[0], 1)
    assert (seen == 2.0).all()
    seen[:] = 4.0
    os.write(to_child[1], b"x")
    assert status_of(pid) == 0
    assert memory.forks == memory.settled
    for end in (*to_child, *to_parent):
        os.close(end)
