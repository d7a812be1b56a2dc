"""A signal handler that raises, at any moment: a local step is whole or was not, and all goes on.

The signals are real; `setitimer` sends them at moments spread over each call.
"""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.shield import get_or_interrupt, shield
from tests.models import bits

pytestmark = pytest.mark.timeout(300, method="thread")  # the alarm is the tests' own

SIZE = 200_000
START = {"b": np.linspace(-1, 1, 7, dtype=np.float32), "w": np.linspace(-1, 1, SIZE, dtype="f4")}
GRADIENT = {"b": np.ones(7, np.float32), "w": np.linspace(3, -2, SIZE, dtype=np.float32)}
MOMENTS = 30


class Interrupted(Exception):
    """What a time limit raises."""


@pytest.fixture(params=[KeyboardInterrupt, Interrupted])
def interrupt(request: pytest.FixtureRequest, untraced: None) -> Iterator[type[BaseException]]:
    def stop(*_: object) -> None:
        raise request.param

    before = signal.signal(signal.SIGALRM, stop)
    yield request.param
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(call: Callable[[], object], after_s: float, error: type[BaseException]) -> bool:
    """Call, and return whether the signal that comes after some time ended the call."""
    try:
        signal.setitimer(signal.ITIMER_REAL, max(after_s, 1e-6))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except error:
        return True
    return False


def trajectory(steps: int) -> list[list[bytes]]:
    with DistNadam(num_shards=2, backend="local").build(START) as optimizer:
        found = [bits(optimizer)]
        for _ in range(steps):
            optimizer.apply_gradients(GRADIENT)
            found.append(bits(optimizer))
        return found


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.mark.parametrize("by_worker", [False, True])
@pytest.mark.parametrize("kernel", ["numpy", "auto"])
def test_an_interrupted_step_was_made_or_was_not(
    interrupt: type[BaseException], kernel: Any, by_worker: bool
) -> None:
    expected = trajectory(2 * MOMENTS + 3)
    options = Options(kernel=kernel)
    with DistNadam(num_shards=2, backend="local", options=options).build(START) as optimizer:
        worker = optimizer.worker(0)

        def step() -> object:
            return worker.step(GRADIENT) if by_worker else optimizer.apply_gradients(GRADIENT)

        step()
        took = min(seconds_of(step) for _ in range(2))
        hits = 0
        for moment in range(MOMENTS):
            before = optimizer.iterations
            hits += interrupted(step, took * moment / MOMENTS, interrupt)
            if by_worker:
                worker.pull()  # completes a push in flight
            assert optimizer.iterations in (before, before + 1)
            assert bits(optimizer) == expected[optimizer.iterations]
        assert hits
        step()
        assert bits(optimizer) == expected[optimizer.iterations]


def test_every_other_call_may_be_interrupted_too(
    interrupt: type[BaseException], tmp_path: Path
) -> None:
    expected = trajectory(2)
    with DistNadam(num_shards=2, backend="local").build(START) as optimizer:
        optimizer.apply_gradients(GRADIENT)
        weights, params = optimizer.get_weights(), optimizer.get_params()
        calls: list[Callable[[], object]] = [
            optimizer.get_params,
            lambda: optimizer.set_params(params),
            lambda: optimizer.set_weights(weights),
            lambda: setattr(optimizer, "lr", optimizer.lr),
            lambda: optimizer.save(tmp_path / "now"),
            lambda: optimizer.save(tmp_path / "behind", wait=False),
            lambda: optimizer.reshard(5 - optimizer.get_config()["num_shards"]),
            lambda: optimizer.worker(0).pull(),
        ]
        for call in calls:
            took = seconds_of(call)
            for moment in range(8):
                interrupted(call, took * moment / 8, interrupt)
                assert bits(optimizer) == expected[1]
        optimizer.apply_gradients(GRADIENT)
        assert bits(optimizer) == expected[2]
    with DistNadam.restore(tmp_path / "now", backend="local") as restored:
        assert bits(restored) == expected[1]


def test_a_wait_for_other_ranks_is_ended_at_once_and_the_push_counts_later(
    interrupt: type[BaseException],
) -> None:
    with DistNadam(num_workers=2, backend="local").build({"w": np.ones(3)}) as optimizer:
        first, second = optimizer.worker(0), optimizer.worker(1)
        assert interrupted(lambda: first.step({"w": np.ones(3)}), 0.05, interrupt)
        assert optimizer.waiting_for() == (1,)
        second.push({"w": np.ones(3)})
        assert first.pull() is not None
        assert optimizer.iterations == 1


def test_every_handler_runs_once_and_after_the_work_whatever_another_raises(
    interrupt: type[BaseException],
) -> None:
    seen: list[str] = []
    handlers = {
        signal.SIGUSR1: lambda *_: seen.append("first"),
        signal.SIGUSR2: lambda *_: seen.append("second"),
    }

    def work() -> None:
        with shield:
            for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGUSR2):
                signal.raise_signal(number)
            assert seen == []
            with shield:
                seen.append("work")
            seen.append("work")

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with pytest.raises(interrupt):
            work()
        assert seen == ["work", "work", "first", "second"]
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_handlers_of_a_user_are_where_they_were(interrupt: type[BaseException]) -> None:
    mine = signal.getsignal(signal.SIGALRM)

    def enter_and_leave() -> None:
        for _ in range(20):
            with shield:
                pass

    took = min(seconds_of(enter_and_leave) for _ in range(3))
    hits = 0
    for moment in range(300):
        hits += interrupted(enter_and_leave, took * moment / 300, interrupt)
        with shield:  # takes away what an interrupt left
            assert signal.getsignal(signal.SIGALRM) is not mine
        assert signal.getsignal(signal.SIGALRM) is mine
    assert hits


def test_errors_come_through_and_other_threads_are_not_shielded() -> None:
    with pytest.raises(ZeroDivisionError), shield:
        raise ZeroDivisionError
    mine = SimpleQueue[Any]()

    def ask() -> None:
        with shield:
            mine.put(signal.getsignal(signal.SIGINT))

    other = threading.Thread(target=ask)
    other.start()
    other.join()
    assert mine.get() is signal.getsignal(signal.SIGINT)
    with pytest.raises(Empty), shield:
        get_or_interrupt(SimpleQueue(), 0.01)


def test_a_handler_that_raises_nothing_ends_no_wait() -> None:
    queue, seen = SimpleQueue[str](), SimpleQueue[int]()
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.put(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)

        def answer() -> None:
            seen.get()
            queue.put("answer")

        thread = threading.Thread(target=answer)
        thread.start()
        with shield:
            assert get_or_interrupt(queue, 60.0) == "answer"
        thread.join()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kernel", ["numpy", "auto"])
@pytest.mark.parametrize(
    "clip", [{}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0, "clipvalue": 0.5}]
)
def test_no_error_state_or_warning_filter_of_the_user_reaches_our_arithmetic(
    kernel: Any, clip: dict[str, float], tmp_path: Path
) -> None:
    params = {"half": np.ones(5, np.float16), "w": np.ones(4, np.float32)}
    tiny = {"half": np.full(5, 1e-7, np.float16), "w": np.full(4, 1e-30, np.float64)}
    huge = {"half": np.full(5, 6e4, np.float16), "w": np.full(4, 1.5e19, np.float64)}
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        made = DistNadam(num_shards=2, backend="local", options=Options(kernel=kernel), **clip)
        with made.build(params) as optimizer:
            for gradient in (tiny, huge, tiny):
                optimizer.apply_gradients(gradient)
                optimizer.worker(0).step(gradient)
                optimizer.set_weights(optimizer.get_weights())
                optimizer.set_params(optimizer.get_params())
            assert optimizer.iterations == 6
            optimizer.save(tmp_path)
        DistNadam.restore(tmp_path, backend="local").close()
