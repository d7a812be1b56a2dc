"""The effects of a shard's machine on their way out: in the order in which they arose, sent by one
thread at a time, whichever queued them.

So no caller gets a round's result before the standby has the round, and no step begins while the
record of the last is still to be sent.
"""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from distnadam.protocol.delivery import RunWork
from distnadam.shard.effects import Compute, Effect, Work


class _QueuedWork(NamedTuple):
    """Work, with what runs it if the thread that queued it sends it too."""

    work: Work
    run_work: RunWork
    thread: int


class Outbox:
    """A queue of effects, and the lock under which the machine that makes them is changed.

    Args:
        carriers: by type, what carries out an effect that is no work; without one it is dropped.
        compute: does work, and receives what runs the work that follows from it.
        run_work: runs work that another thread sends than queued it.
        can_send: whether effects may leave now, None if always; if not, they wait for the next
            `flush`.

    Attributes:
        carriers: as given; may be added to.
        lock: held whenever the machine is changed, or read by another thread.
        put_off: changes the machine by what was put off; None if nothing was. Whoever takes the
            lock to change the machine, or to read it, calls `settle` first.
    """

    def __init__(
        self,
        carriers: dict[type[Effect], Callable[[Any], None]],
        compute: Callable[[Work, RunWork], None],
        *,
        run_work: RunWork,
        can_send: Callable[[], bool] | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.carriers = carriers
        self.put_off: Callable[[], None] | None = None
        self._compute = compute
        self._run_work = run_work
        self._can_send = can_send
        self._queued: deque[Effect | _QueuedWork] = deque()
        # belongs to the thread that sends
        self._sending: deque[Effect | _QueuedWork] = deque()
        self._is_sending = False

    def settle(self) -> None:
        """Change the machine by what was put off, under the lock."""
        if (put_off := self.put_off) is not None:
            self.put_off = None
            put_off()

    @property
    def is_idle(self) -> bool:
        """Whether no thread changes the machine, or sends what came of it."""
        return not self.lock.locked() and not self._is_sending

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be sent, and nothing is on its way; asked under the lock."""
        return not (self._queued or self._sending or self._is_sending)

    @property
    def may_begin(self) -> bool:
        """Whether nothing waits to be sent, as `is_empty`, and what comes now might leave."""
        waits = self._queued or self._sending or self._is_sending
        return not waits and (self._can_send is None or self._can_send())

    def enter(
        self, run_work: RunWork, change: Callable[..., bool | None], *arguments: Any
    ) -> bool | None:
        """Change the machine under the lock by what has no effect but a step, and return whether
        the caller must begin that; None, and no change, where effects wait that must leave before.
        """
        with self.lock:
            self.settle()
            if not self.is_empty:
                return None
            is_due = change(*arguments)
            if is_due and not self._may_send():
                self._queued.append(_QueuedWork(Work.STEP, run_work, threading.get_ident()))
                return False
            return is_due

    def put(self, run_work: RunWork, change: Callable[..., list[Effect]], *arguments: Any) -> bool:
        """Change the machine under the lock, and queue the effects.

        Return whether the caller must `send` them now; if not, another thread does, or they may not
        leave.
        """
        with self.lock:
            self.settle()
            return self.queue(run_work, change(*arguments))

    def queue(self, run_work: RunWork, effects: list[Effect]) -> bool:
        """Queue the effects of a change of the machine, under that lock; return as `put`."""
        for effect in effects:
            self._queued.append(
                _QueuedWork(effect.work, run_work, threading.get_ident())
                if isinstance(effect, Compute)
                else effect
            )
        return self._begin()

    def _may_send(self) -> bool:
        return self._can_send is None or self._can_send()

    def flush(self) -> None:
        """Send all effects that may leave now, unless another thread does."""
        with self.lock:
            begins = self._begin()
        if begins:
            self.send()

    def _begin(self) -> bool:
        """Take what is queued, under the lock; return whether this thread is to send it."""
        if self._is_sending:
            return False
        self._sending.extend(self._queued)
        self._queued.clear()
        self._is_sending = bool(self._sending) and self._may_send()
        return self._is_sending

    def send(self) -> None:
        """Send effects, where `put` has said so; begin work after them."""
        works: list[tuple[Work, RunWork]] = []  # one at most: the machine asks for one at a time
        try:
            while self._is_sending:
                while self._sending and self._may_send():
                    effect = self._sending.popleft()
                    if isinstance(effect, _QueuedWork):
                        is_own = effect.thread == threading.get_ident()
                        works.append((effect.work, effect.run_work if is_own else self._run_work))
                    elif (carry := self.carriers.get(type(effect))) is not None:
                        carry(effect)
                with self.lock:
                    self._is_sending = False
                    self._begin()
        except BaseException:
            self._is_sending = False
            raise
        for work, run_work in works:
            run_work(partial(self._compute, work, run_work))
