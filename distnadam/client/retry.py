"""What a client does about each error of a shard that may pass, and how long it tries.

No message and no state: it runs what it is given, and recovers in between.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from distnadam.backends.base import ShardTransport
from distnadam.errors import (
    DistNadamError,
    IllegalMessage,
    Reconfigured,
    Rewound,
    ShardLost,
    StaleEpoch,
    StepTimeout,
)
from distnadam.shield import raise_interrupt
from distnadam.waiting import said_if_long

_T = TypeVar("_T")


class Retry:
    """Makes requests again that can be made again from their beginning, while shards are replaced.

    | error            | meaning                                      | before the next attempt   |
    | ---------------- | -------------------------------------------- | ------------------------- |
    | `ShardLost`      | a shard's process died                       | wait until it is replaced |
    | `Reconfigured`   | shards moved, or the members changed         | learn where they are      |
    | `IllegalMessage` | a shard that moved or is loading refused it  | wait for a newer version  |
    | `Rewound`        | all shards went back: the work itself is old | none: raised              |
    | `StaleEpoch`     | the state was replaced while the work waited | nothing                   |

    Any other error is raised, and so is `IllegalMessage` if the shards have not moved.

    Args:
        transport: of the shards that the requests go to.
        timeout_s: how long one recovery, or one thing that is polled for, may take.
        poll_s: how long to sleep between two looks at something that is polled for.
    """

    def __init__(self, transport: ShardTransport, timeout_s: float, poll_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._poll_s = poll_s

    def run(self, work: Callable[[], _T]) -> _T:
        """Return what `work` returns, calling it again after each error that passes."""
        while True:
            version = self._transport.version
            try:
                return work()
            except DistNadamError as error:
                self.recover(error, version)

    def recover(self, error: DistNadamError, version: int) -> None:
        """Do what the table says; raise the error if the work is not to be done again.

        Args:
            error: raised by the work.
            version: the transport's when the work began.
        """
        match error:
            case Rewound():
                raise error
            case ShardLost():
                with self._said_if_long(error):
                    self._transport.await_recovery(self._timeout_s)
            case Reconfigured():
                self._transport.refresh()
            case StaleEpoch():
                pass
            case IllegalMessage():
                with self._said_if_long(error):
                    moved = self._transport.wait_if_moved(version)
                if not moved:
                    raise error
            case _:
                raise error

    def _said_if_long(self, why: DistNadamError) -> AbstractContextManager[None]:
        """Say for which shard a recovery waits, if it takes long."""
        return said_if_long("recovery of the shards", lambda: f"since {why}", self._timeout_s)

    def pause(self, began: float, problem: str, timeout_s: float | None = None) -> None:
        """Sleep for a moment, in a wait for something that is polled for.

        Args:
            began: when the wait began, by `time.monotonic`.
            problem: the beginning of the error's sentence.
            timeout_s: how long the wait may take; None means this object's.

        Raises:
            StepTimeout: the time is over.
        """
        raise_interrupt()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if time.monotonic() > began + timeout_s:
            raise StepTimeout(f"{problem} in {timeout_s:g} s")
        time.sleep(self._poll_s)

    def poll(
        self,
        work: Callable[[], _T],
        problem: str,
        *,
        until_not: type[DistNadamError],
        timeout_s: float | None = None,
    ) -> _T:
        """Return what `work` returns, calling it again as long as it raises `until_not`.

        Raises:
            StepTimeout: saying what the problem is; that error is its cause.
        """
        began = time.monotonic()
        while True:
            try:
                return work()
            except until_not as error:
                try:
                    self.pause(began, problem, timeout_s)
                except StepTimeout as timeout:
                    raise timeout from error
