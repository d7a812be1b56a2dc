"""The end of a process and a fork of it: a save in the background is whole or said to be lost, and
a forked child works or is refused at once.
"""

import os
import resource
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import LifecycleError
from distnadam.runtime.shard_kernel import StepsAhead
from distnadam.threads import in_background

SCRIPT = """
import atexit, resource, sys, threading
import numpy as np
from distnadam import DistNadam
path = sys.argv[1]
optimizer = DistNadam(backend="local").build({"w": np.ones(4_000_000, np.float32)})
"""
# bytecode would be cut, for all who import it later
FAILS = """
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
"""
BEHIND = "handle = optimizer.save(path, wait=False)\n"


def run(path: Path, script: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT + script, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "script",
    [
        BEHIND,
        BEHIND + "del handle, optimizer",
        BEHIND + "optimizer.apply_gradients({'w': np.ones(4_000_000)})",
        "threading.Thread(target=lambda: optimizer.save(path, wait=False)).start()",
        "atexit.register(lambda: optimizer.save(path))",
    ],
    ids=["last statement", "no reference", "a step after it", "in a thread", "at exit"],
)
def test_a_save_at_the_end_of_a_script_is_complete(tmp_path: Path, script: str) -> None:
    ended = run(tmp_path, script)
    assert (ended.returncode, ended.stderr) == (0, "")
    with DistNadam.restore(tmp_path, backend="local") as restored:
        assert restored.get_params()["w"].shape == (4_000_000,)


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "del handle, optimizer"])
def test_a_save_that_fails_at_the_end_of_a_script_is_its_status(tmp_path: Path, end: str) -> None:
    ended = run(tmp_path, FAILS + BEHIND + end)
    assert ended.returncode == 1
    assert "distnadam: a background save failed: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_failed_save_that_was_told_leaves_the_status_alone(tmp_path: Path) -> None:
    told = "try: handle.result()\nexcept Exception as error: print(type(error).__name__)\n"
    ended = run(tmp_path, FAILS + BEHIND + told)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "CheckpointError\n", "")


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child and return its status: 0 if it raised nothing."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("behind", [False, True], ids=["idle", "while it saves"])
def test_a_child_forked_between_two_rounds_has_an_optimizer_of_its_own(
    tmp_path: Path, threads: int, behind: bool
) -> None:
    params = {"w": np.ones(600_000, np.float32)}
    options = Options(threads=threads)
    with DistNadam(backend="local", num_shards=2, options=options).build(params) as optimizer:
        worker = optimizer.worker(0)
        optimizer.apply_gradients(params)
        handle = optimizer.save(tmp_path / "parent", wait=False) if behind else None

        def work() -> None:
            assert optimizer.apply_gradients(params) == 2
            assert worker.step(params)["w"].shape == (600_000,)
            optimizer.save(tmp_path / "child")
            optimizer.save(tmp_path / "later", wait=False)
            optimizer.close()

        assert in_child(work) == 0
        assert optimizer.iterations == 1
        if handle is not None:
            assert Path(str(handle.result())).is_dir()  # type: ignore[union-attr]
    for name in ("child", "later"):
        with DistNadam.restore(tmp_path / name, backend="local") as restored:
            assert restored.iterations == 3


def test_a_child_forked_amid_a_step_of_another_thread_is_refused_at_once() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def rate(_: int) -> float:
        inside.set()
        go_on.wait()
        return 0.1

    with DistNadam(rate, backend="local", num_shards=2).build({"w": np.ones(9)}) as optimizer:
        stepping = in_background("step", lambda: optimizer.apply_gradients({"w": np.ones(9)}))
        inside.wait()

        def work() -> None:
            step = partial(optimizer.apply_gradients, {"w": np.ones(9)})
            for call in (optimizer.get_params, step):
                with pytest.raises(LifecycleError, match="forked from its optimizer's while"):
                    call()

        status = in_child(work)
        go_on.set()
        assert stepping.result() == 1
        assert status == 0


def test_a_child_goes_on_where_rounds_that_went_ahead_were_not_counted_yet() -> None:
    ones = {"w": np.ones(9)}
    with DistNadam(backend="local").build(ones) as optimizer, optimizer.worker(0) as worker:
        for _ in range(6):
            worker.step(ones)

        def work() -> None:
            for _ in range(5):
                worker.step(ones)
            assert optimizer.iterations == 11

        assert in_child(work) == 0
        assert worker.step(ones)["w"].shape == (9,) and optimizer.iterations == 7


def test_a_child_forked_amid_a_step_that_goes_ahead_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ones, inside, go_on = {"w": np.ones(9)}, threading.Event(), threading.Event()
    step_ahead = StepsAhead.step

    def step(self: StepsAhead, *given: Any) -> None:
        inside.set()
        go_on.wait()
        step_ahead(self, *given)

    with DistNadam(backend="local").build(ones) as optimizer, optimizer.worker(0) as worker:
        for _ in range(6):
            worker.step(ones)
        monkeypatch.setattr(StepsAhead, "step", step)
        stepping = in_background("step", lambda: worker.step(ones))
        inside.wait()

        def work() -> None:
            steps = [partial(step, ones) for step in (optimizer.apply_gradients, worker.step)]
            for call in (optimizer.get_params, *steps):
                with pytest.raises(LifecycleError, match="forked from its optimizer's while"):
                    call()

        status = in_child(work)
        go_on.set()
        assert stepping.result()["w"].shape == (9,)
        assert status == 0 and optimizer.iterations == 7


def test_work_is_done_by_its_caller_where_no_thread_can_be_started() -> None:
    script = """
import resource, threading
from distnadam.threads import in_background
threading.stack_size(1 << 30)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
future = in_background("x", threading.current_thread)
assert future.result() is threading.main_thread()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
