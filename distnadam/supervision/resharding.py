"""Move the whole state to other shards between two rounds; the same for every kind of process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from distnadam.errors import DistNadamError, ShardLost, StepTimeout
from distnadam.protocol.messages import Resume
from distnadam.protocol.shard_status import ShardSpec
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

    Whatever fails before they retire, the present shards go on and the new ones are terminated.

    Args:
        processes: starts and reaches shards.
        what: from where, to where.
        replaced: called with the new specs and shards once these hold the state and the old ones
            are retired, and not before: see `discovery`.

    Raises:
        ClusterError: no process can be started for a new shard, a present one is dead, or does not
            pause in time.
    """
    old = list(what.shards)
    first = what.specs[0]
    specs = [
        replace(
            first,
            index=index,
            num_shards=len(what.cuts),
            ranges=ranges,
            layout_generation=first.layout_generation + 1,
        )
        for index, ranges in enumerate(what.cuts)
    ]

    def ask(messages: Mapping[int, Any]) -> dict[int, Any]:
        return ask_all_or_raise(processes, old, messages, what.pause_s)

    def resume(messages: Mapping[int, Resume]) -> None:
        processes.ask(dict(enumerate(old)), messages, what.pause_s)

    new: list[ShardProcess] = []
    try:
        for spec in specs:
            new.append(processes.start(spec, standby=False, near=[*old, *new]))
        with ExitStack() as stack:
            try:
                held = stack.enter_context(all_paused(ask, resume, what.token, len(old)))
            except DistNadamError as error:
                raise StepTimeout(
                    f"reshard: the shards could not be paused between two rounds: {error}; try "
                    "again"
                ) from error
            epoch = max(what.epoch, *(answer.epoch for answer in held.values())) + 1
            move = Move(
                token=what.token,
                old=old,
                new=new,
                old_cuts=[spec.ranges for spec in what.specs],
                new_cuts=what.cuts,
                load=Load(epoch=epoch, newest=dict(what.newest), lr=held[0].lr),
            )
            for failure in processes.move(move):
                raise failure
            retire = {index: Retire(epoch) for index in range(len(old))}
            processes.ask(dict(enumerate(old)), retire, _RETIRE_S)
            replaced(specs, new)
    except BaseException:
        processes.terminate(*new)
        raise
    processes.terminate(*old)


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
