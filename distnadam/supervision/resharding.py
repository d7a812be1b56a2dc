"""Move the whole state to other shards between two rounds; the same for every kind of process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from distnadam.errors import DistNadamError, ShardLost, StaleEpoch, StepTimeout
from distnadam.protocol.messages import Resume, ShardSpec
from distnadam.protocol.supervisor_messages import Load, Retire
from distnadam.supervision.pause import all_paused
from distnadam.supervision.process_manager import Move, ShardProcess, ShardProcesses
from distnadam.tensors.layout import Ranges

_RETIRE_S = 60.0
"""Seconds in which a shard has copied what it was to save, before it releases its arrays."""


@dataclass(frozen=True, kw_only=True)
class Resharding:
    """A reshard that is to be done.

    Args:
        token: to pause the present shards by.
        specs: the present shards', in order.
        shards: the present shards, in order.
        cuts: the new shards' ranges, in order.
        epoch: the highest known; the new shards begin in a later one.
        newest: the newest incarnation of each rank.
        pause_s: seconds in which the present shards pause.
    """

    token: str
    specs: Sequence[ShardSpec]
    shards: Sequence[ShardProcess]
    cuts: Sequence[Ranges]
    epoch: int
    newest: Mapping[int, int]
    pause_s: float


def reshard(
    processes: ShardProcesses,
    what: Resharding,
    replaced: Callable[[Sequence[ShardSpec], Sequence[ShardProcess]], None],
) -> None:
    """Start new shards, pause the present ones, move their state, retire and terminate them.

    Whatever fails before the state has moved, the present shards go on and the new ones are
    terminated. From then on the new shards are the state: an interrupt still retires and replaces
    the old ones.

    Args:
        processes: starts and reaches shards.
        what: from where, to where.
        replaced: called with the new specs and shards once these hold the state and the old ones
            are retired, and not before: see `discovery`; called again after an interrupt.

    Raises:
        ClusterError: no process can be started for a new shard, a present one is dead, or does not
            pause in time.
        StaleEpoch: the state was replaced before the shards paused.
    """
    handover = _Handover(processes, what, replaced)
    try:
        handover.start_new()
        handover.move()
        handover.replace_old()
    except BaseException:
        handover.settle()
        raise
    processes.terminate(*handover.old)


class _Handover:
    """Where a reshard stands: the old shards are the state until it has moved, then the new ones.

    Args:
        processes: starts and reaches shards.
        what: from where, to where.
        replaced: see `reshard`.
    """

    def __init__(
        self,
        processes: ShardProcesses,
        what: Resharding,
        replaced: Callable[[Sequence[ShardSpec], Sequence[ShardProcess]], None],
    ) -> None:
        first = what.specs[0]
        self.old = list(what.shards)
        self._processes = processes
        self._what = what
        self._replaced = replaced
        self._specs = [
            replace(
                first,
                index=index,
                num_shards=len(what.cuts),
                ranges=ranges,
                cuts=tuple(what.cuts),
                layout_generation=first.layout_generation + 1,
            )
            for index, ranges in enumerate(what.cuts)
        ]
        self._new: list[ShardProcess] = []
        self._epoch = what.epoch
        self._moved = False
        self._published = False

    def start_new(self) -> None:
        """Start the new shards, empty; of as many as there are, each where the old one is, since
        their cuts may be for what each host can do.
        """
        stay = len(self._specs) == len(self.old)
        for spec in self._specs:
            near = [*self.old, *self._new]
            beside = self.old[spec.index] if stay else None
            started = self._processes.start(spec, standby=False, near=near, beside=beside)
            self._new.append(started)

    def move(self) -> None:
        """Pause the old shards and have the new ones load their state.

        The old shards stay paused if this succeeds: from here the new ones are the state.
        """
        what = self._what
        with ExitStack() as stack:
            try:
                held = stack.enter_context(
                    all_paused(self._ask, self._resume, what.token, len(self.old))
                )
            except StaleEpoch:
                raise
            except DistNadamError as error:
                raise StepTimeout(
                    f"reshard: the shards could not be paused between two rounds: {error}; try "
                    "again"
                ) from error
            self._epoch = max(what.epoch, *(answer.epoch for answer in held.values())) + 1
            move = Move(
                token=what.token,
                old=self.old,
                new=self._new,
                old_cuts=[spec.ranges for spec in what.specs],
                new_cuts=what.cuts,
                load=Load(epoch=self._epoch, newest=dict(what.newest), config=held[0].config),
            )
            for failure in self._processes.move(move):
                raise failure
            self._moved = True

    def replace_old(self) -> None:
        """Retire the old shards and report the new ones; may be repeated after an interrupt."""
        try:
            retire = {index: Retire(self._epoch) for index in range(len(self.old))}
            self._processes.ask(dict(enumerate(self.old)), retire, _RETIRE_S)
        finally:  # those that did not retire stay paused
            self._replaced(self._specs, self._new)
        self._published = True

    def settle(self) -> None:
        """After a failure, leave the shards at work that are the state, and end the others."""
        if not self._moved:
            self._processes.terminate(*self._new)
            return
        if not self._published:
            self.replace_old()
        self._processes.terminate(*self.old)

    def _ask(self, messages: Mapping[int, Any]) -> dict[int, Any]:
        return ask_all_or_raise(self._processes, self.old, messages, self._what.pause_s)

    def _resume(self, messages: Mapping[int, Resume]) -> None:
        if not self._moved:  # else the step that an old shard applies next would be lost
            self._processes.ask(dict(enumerate(self.old)), messages, self._what.pause_s)


def ask_all_or_raise(
    processes: ShardProcesses,
    shards: Sequence[ShardProcess],
    messages: Mapping[int, Any],
    timeout_s: float,
) -> dict[int, Any]:
    """Return every shard's answer; raise the first error."""
    answers = processes.ask(dict(enumerate(shards)), messages, timeout_s)
    for index in messages:
        if isinstance(
            answer := answers.get(index, ShardLost(f"shard {index}: is dead")), Exception
        ):
            raise answer
    return answers
