"""Effects on their way out of a shard's machine: in the order they came to be, by one thread at a
time, whoever brought them.

So nobody hears of a round before the standby has it, and no step begins while the mean of the last
is yet to be announced.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from distnadam.protocol.delivery import RunWork
from distnadam.shard.phases import Compute, Effect, Work


class Outbox:
    """See the module.

    Args:
        lock: the machine's, held by whoever calls `put`.
        carry: carries out one effect that is no work.
        begin: begins work by the runner given.
        run_work: runs work that another thread than its own comes upon.
        can_send: whether effects may leave now; if not, they wait for the next `empty`.
    """

    def __init__(
        self,
        lock: threading.Lock,
        carry: Callable[[Any], None],
        begin: Callable[[Work, RunWork], object],
        run_work: RunWork,
        can_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self._lock = lock
        self._carry = carry
        self._begin = begin
        self._run_work = run_work
        self._can_send = can_send
        self._queued: deque[tuple[Effect, RunWork, int]] = deque()
        self._at_hand: deque[tuple[Effect, RunWork, int]] = (
            deque()
        )  # whoever is at it has these to itself
        self._busy = False

    def put(self, effects: list[Effect], run: RunWork) -> None:
        """Queue effects, under the lock under which they came to be."""
        if effects:
            owner = threading.get_ident()
            self._queued.extend([(effect, run, owner) for effect in effects])

    def empty(self) -> None:
        """Carry out all there is, unless another thread is at it; work begins last, beside whatever
        comes next.
        """
        with self._lock:
            if self._busy:
                return
            self._busy = True
        begun: list[
            tuple[Work, RunWork]
        ] = []  # one at most: the machine asks for no more before it was reported
        try:
            while self._fetch():
                while self._at_hand and self._can_send():
                    effect, run, owner = self._at_hand.popleft()
                    if isinstance(effect, Compute):
                        begun.append(
                            (effect.work, run if owner == threading.get_ident() else self._run_work)
                        )
                    else:
                        self._carry(effect)
        except BaseException:
            self._busy = False
            raise
        for work, run in begun:
            self._begin(work, run)

    def _fetch(self) -> bool:
        """Take what is queued; return whether there is anything that may leave, and where not, be
        done.
        """
        with self._lock:
            self._at_hand.extend(self._queued)
            self._queued.clear()
            self._busy = bool(self._at_hand) and self._can_send()
            return self._busy
