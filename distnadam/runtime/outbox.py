"""Effects on their way out of a shard's machine: in the order they came to be, by one thread at a
time, whoever brought them.

So nobody hears of a round before the standby has it, and no step begins while the mean of the last
is yet to be announced.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from distnadam.shard.phases import Compute, Effect, Work

Run = Callable[[Callable[[], None]], object]


class Outbox:
    """See the module.

    Args:
        lock: the machine's, held by whoever calls `put`.
        carry: carries out one effect that is no work.
        begin: begins work by the runner given.
        run: the runner of work that another thread than its own comes upon.
        may: whether anything may leave now; what may not waits for the next `empty`.
    """

    def __init__(
        self,
        lock: threading.Lock,
        carry: Callable[[Any], None],
        begin: Callable[[Work, Run], object],
        run: Run,
        may: Callable[[], bool] = lambda: True,
    ) -> None:
        self._lock, self._carry, self._begin, self._run, self._may = lock, carry, begin, run, may
        self._queued: deque[tuple[Effect, Run, int]] = deque()
        self._at_hand: deque[tuple[Effect, Run, int]] = (
            deque()
        )  # whoever is at it has these to itself
        self._busy = False

    def put(self, effects: list[Effect], run: Run) -> None:
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
            tuple[Work, Run]
        ] = []  # one at most: the machine asks for no more before it was reported
        try:
            while self._fetch():
                while self._at_hand and self._may():
                    effect, run, owner = self._at_hand.popleft()
                    if isinstance(effect, Compute):
                        begun.append(
                            (effect.work, run if owner == threading.get_ident() else self._run)
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
            self._busy = bool(self._at_hand) and self._may()
            return self._busy
