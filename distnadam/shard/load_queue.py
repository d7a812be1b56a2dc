"""The orders of a shard to load a state, or to copy its own to a standby: one at a time, loads
first. Pure.
"""

from typing import Any

from distnadam.errors import IllegalMessage
from distnadam.protocol.supervisor_messages import AttachStandby, Load, ShardControlState
from distnadam.shard.effects import Answer, Effect
from distnadam.shard.progress import Progress


class LoadQueue:
    """Orders that wait or are being carried out, each with its caller, and the last load's answer.

    Args:
        shard: the shard's index, for messages.
        progress: what a load replaces.

    Attributes:
        entries: the orders, each with its caller; the first is being carried out, or is next.
    """

    def __init__(self, shard: int, progress: Progress) -> None:
        self._shard = shard
        self._progress = progress
        self.entries: list[tuple[Any, Load | AttachStandby]] = []
        self._has_begun = False
        self._last_epoch = 0
        self._last_answer: Any = None

    @property
    def first(self) -> Load | AttachStandby | None:
        """The order that is being carried out, or is next; None if there is none."""
        return self.entries[0][1] if self.entries else None

    def add_load(self, load: Load, caller: Any) -> list[Effect]:
        """Queue a load before all copies, which may wait for a round that never ends.

        One of the epoch loaded last is answered as that one was, since its answer may be lost.

        Raises:
            IllegalMessage: its epoch has passed.
        """
        if load.epoch == self._last_epoch:
            return [Answer(caller, self._last_answer)]
        if self._is_stale(load) and not self._is_loading(load.epoch):
            raise self._stale(load)
        waiting = range(int(self._has_begun), len(self.entries))
        copies = (i for i in waiting if isinstance(self.entries[i][1], AttachStandby))
        self.entries.insert(next(copies, len(self.entries)), (caller, load))
        return []

    def add_copy(self, order: AttachStandby, caller: Any) -> list[Effect]:
        """Queue an order to copy the state."""
        self.entries.append((caller, order))
        return []

    def skip_stale(self) -> list[Effect]:
        """Answer the next order if it is a load whose epoch has passed meanwhile."""
        load = self.first
        if not isinstance(load, Load) or not self._is_stale(load):
            return []
        caller, _ = self.entries.pop(0)
        is_repeated = load.epoch == self._last_epoch
        return [Answer(caller, self._last_answer if is_repeated else self._stale(load))]

    def begin(self) -> None:
        """Begin to carry out the first order."""
        self._has_begun = True

    def end(self, result: Any) -> Answer:
        """End the order that was carried out: take what was loaded, and return its answer."""
        self._has_begun = False
        caller, order = self.entries.pop(0)
        if isinstance(order, Load):
            if isinstance(result, ShardControlState):
                self._progress.load(result, order)
                result = self._progress.round
            self._last_epoch = order.epoch
            self._last_answer = result
        return Answer(caller, result)

    def remove_copies(self) -> list[Any]:
        """Remove the orders to copy, and return their callers."""
        copies = [caller for caller, order in self.entries if isinstance(order, AttachStandby)]
        self.entries = [entry for entry in self.entries if isinstance(entry[1], Load)]
        return copies

    def drain(self) -> list[Any]:
        """Remove every order, and return their callers."""
        callers = [caller for caller, _ in self.entries]
        self.entries = []
        self._has_begun = False
        return callers

    def _is_loading(self, epoch: int) -> bool:
        first = self.first
        return self._has_begun and isinstance(first, Load) and first.epoch == epoch

    def _is_stale(self, load: Load) -> bool:
        return load.epoch <= self._progress.epochs.now > 0

    def _stale(self, load: Load) -> IllegalMessage:
        return IllegalMessage(
            f"shard {self._shard}: a load of epoch {load.epoch} came in epoch "
            f"{self._progress.epochs.now}"
        )
