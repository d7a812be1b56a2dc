"""What a client does about each error, by the table of `Retry`."""

from typing import Any

import pytest

from distnadam import waiting
from distnadam.backends.base import ShardTransport
from distnadam.client.retry import Retry
from distnadam.client.rewind_guard import RewindGuard
from distnadam.errors import (
    ConfigError,
    DistNadamError,
    IllegalMessage,
    LatePush,
    Reconfigured,
    Rewound,
    ShardLost,
    ShardUnavailable,
    StaleEpoch,
    StepTimeout,
)
from tests.client.conftest import Said


class Transport(ShardTransport):
    """Records what it is asked to do between two attempts."""

    cuts = ({},)
    version = 3

    def __init__(self, *, moves: bool = False) -> None:
        self.done: list[str] = []
        self._moves = moves

    def refresh(self) -> None:
        self.done.append("refresh")

    def await_recovery(self, timeout_s: float) -> None:
        self.done.append(f"await recovery for {timeout_s:g} s")

    def wait_if_moved(self, version: int) -> bool:
        self.done.append(f"wait if moved since {version}")
        return self._moves

    def post(self, messages: Any) -> Any:
        raise AssertionError

    def open_channel(self, layout: Any, ranges: Any, rank: int, incarnation: int) -> Any:
        raise AssertionError

    def require_open(self) -> None:
        raise AssertionError

    def new_token(self) -> str:
        raise AssertionError


def fails_with(*errors: DistNadamError) -> Any:
    """Work that raises these errors, one at each attempt, then returns "done"."""
    left = list(errors)

    def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


@pytest.mark.parametrize(
    ("error", "recovery"),
    [
        (ShardLost("died"), ["await recovery for 5 s"]),
        (ShardUnavailable("lost call"), ["await recovery for 5 s"]),
        (Reconfigured("moved"), ["refresh"]),
        (StaleEpoch("replaced"), []),
        (IllegalMessage("loading"), ["wait if moved since 3"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_work_is_done_again_after_an_error_that_passes(
    error: DistNadamError, recovery: list[str]
) -> None:
    transport = Transport(moves=True)
    assert Retry(transport, 5.0, 0.0).run(fails_with(error, error)) == "done"
    assert transport.done == recovery * 2


@pytest.mark.parametrize(
    "error",
    [Rewound("went back"), IllegalMessage("illegal"), LatePush("late"), ConfigError("wrong")],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_is_raised(error: DistNadamError) -> None:
    with pytest.raises(type(error)) as caught:
        Retry(Transport(), 5.0, 0.0).run(fails_with(error))
    assert caught.value is error


def test_polling_goes_on_until_it_is_too_late() -> None:
    retry = Retry(Transport(), 1e9, 0.0)
    assert retry.poll(fails_with(*[LatePush("x")] * 3), "late", until_not=LatePush) == "done"
    with pytest.raises(StepTimeout, match="nobody came in -1 s") as caught:
        retry.poll(fails_with(LatePush("x")), "nobody came", until_not=LatePush, timeout_s=-1.0)
    assert isinstance(caught.value.__cause__, LatePush)
    with pytest.raises(ShardLost):
        retry.poll(fails_with(ShardLost("died")), "late", until_not=LatePush)


def test_a_rewind_is_raised_once_and_never_at_the_first_look() -> None:
    guard = RewindGuard("worker 1: ")
    guard.check(4, epoch=5, round=2)
    guard.check(4, epoch=5, round=2)
    with pytest.raises(Rewound, match=r"worker 1: all shards went back .* to round 1") as caught:
        guard.check(6, epoch=6, round=1)
    assert (caught.value.epoch, caught.value.step) == (6, 1)
    guard.check(6, epoch=7, round=3)
    guard.acknowledge(8)
    guard.check(8, epoch=8, round=3)


@pytest.mark.parametrize(
    "error", [ShardLost("shard 1: its process died"), IllegalMessage("shard 1: is loading")]
)
def test_a_recovery_that_lasts_is_said_once_with_the_shard_that_it_waits_for(
    error: DistNadamError,
    monkeypatch: pytest.MonkeyPatch,
    said: Said,
) -> None:
    class Slow(Transport):
        def await_recovery(self, timeout_s: float) -> None:
            assert said.wait(60)

        def wait_if_moved(self, version: int) -> bool:
            return said.wait(60)

    monkeypatch.setattr(waiting, "REPORT_WAIT_S", 0.01)
    assert Retry(Slow(), 300.0, 0.0).run(fails_with(error)) == "done"
    assert said.messages == [
        f"recovery of the shards: has waited 0.01 s, since {error}; it waits on, up to 300 s"
    ]
