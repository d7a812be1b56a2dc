"""A round that is ordinary, closed and ended by the caller's own thread: all members push in one
epoch, nobody holds the shard or waits to, no norms are needed. Pure.

Nearly every round is. Nothing is decided here: a round is entered, counted and begun anew by the
same `Rounds` and `Progress`, and whatever is not ordinary goes to `Shard.receive`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import distnadam.protocol.messages as msg
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.round_settings import ORDINARY
from distnadam.shard.effects import Effect, Replicate, Work
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary_push import members_if_ordinary
from distnadam.shard.phases import Phase


def close(shard: Shard, first: msg.Push | msg.Step, *others: msg.Push) -> bool:
    """Enter the pushes that the round in progress still lacks, or a direct step, and close the
    round for its step; return False, with nothing changed, unless it is ordinary.

    Nobody waits for those pushes: their caller learns of the round's end by `end`.
    """
    current = shard.rounds.current
    if isinstance(first, msg.Step):
        if not _is_ordinary(shard, first):
            return False
        shard.rounds.enter_direct(first)
    else:
        pushes = current.pushes
        if first.want_parameters or (needed := members_if_ordinary(shard, first)) is None:
            return False
        if len(pushes) + 1 + len(others) != len(needed) or not (
            not pushes or pushes.keys() <= set(needed)
        ):
            return False
        if others and not _are_alike(shard, first, others):
            return False
        for push in (first, *others):
            current.pushes[push.rank] = push
        if first.settings is not ORDINARY:
            current.is_ordinary = False
    current.overrides = first.settings.overrides  # those of all
    current.is_closed = True
    shard.enter(Phase.STEPPING)
    return True


def _are_alike(shard: Shard, first: msg.Push, others: Sequence[msg.Push]) -> bool:
    """Whether other ranks' pushes are ordinary, each as the first of its rank, and have the first
    one's settings.
    """
    ranks = {first.rank}
    for push in others:
        ranks.add(push.rank)
        if (
            push.want_parameters
            or members_if_ordinary(shard, push) is None
            or not (push.settings is first.settings or push.settings == first.settings)
        ):
            return False
    return len(ranks) == 1 + len(others)


def _is_ordinary(shard: Shard, step: msg.Step) -> bool:
    """Whether a direct step is current, holds no shard, and has no norms, and no settings but
    overrides, and nobody else acts.
    """
    current, hold = shard.rounds.current, shard.exclusive_hold
    return not (
        shard.phase is not Phase.COLLECTING
        or step.token is not None
        or step.round != shard.progress.round + 1
        or step.epoch != shard.epochs.now
        or step.rejection is not None
        or not (step.settings is ORDINARY or step.settings.only_overrides)
        or current.pushes
        or current.waiting
        or hold.holder is not None
        or hold.queue
        or shard.config.clips_by_norm
        or shard.loads.entries
        or shard.members.given_up
    )


def end(shard: Shard, clock: Clock, lr: float, *, replicates: bool) -> list[Effect]:
    """Take the result of the step of a round that `close` closed: end the round, begin the next.

    Its record for a standby is among the effects where it `replicates`.
    """
    rounds, hold = shard.rounds, shard.exclusive_hold
    if (
        rounds.current.waiting
        or rounds.pulls
        or hold.queue
        or hold.advances
        or shard.loads.entries
        or shard.members.given_up
        or shard.phase is not Phase.STEPPING
    ):
        return shard.computed(Work.STEP, (clock, lr))
    shard.progress.take_step(clock, lr, rounds.current)
    counted = rounds.count("applied", None)
    shard.enter(Phase.COLLECTING)
    return [Replicate(shard.progress.record(counted))] if replicates else []


def may_go_ahead(shard: Shard, pushes: Sequence[msg.Push]) -> bool:
    """Whether every round from the next on is one of `count_ahead`, as long as these workers push
    alike and the shard gets no other message.
    """
    rounds, progress, hold = shard.rounds, shard.progress, shard.exclusive_hold
    current, members, number = rounds.current, shard.members, shard.progress.round + 1
    first, ranks = members.schedule[-1]
    return not (
        shard.phase is not Phase.COLLECTING
        or current.pushes
        or current.superseded
        or current.completed
        or current.waiting
        or current.refusal is not None
        or rounds.pulls
        or hold.holder is not None
        or hold.limit != math.inf
        or hold.queue
        or hold.advances
        or shard.loads.entries
        or shard.state.in_place
        or shard.config.clips_by_norm
        or progress.loss_scale is not None
        or members.given_up
        or first > number
        or sorted(ranks) != sorted([push.rank for push in pushes])
        or any(
            push.settings is not ORDINARY
            or push.rejection is not None
            or push.want_parameters
            or push.slices
            or push.epoch != progress.epochs.now
            or push.incarnation != members.ledger.newest[push.rank]
            for push in pushes
        )
    )


def count_ahead(
    shard: Shard, pushes: Sequence[msg.Push], rounds: int, clock: Clock, lr: float
) -> None:
    """Count so many rounds that were stepped one after the other while `may_go_ahead` held, each by
    these pushes but for their round; the clock and the learning rate are those of the last.
    """
    progress, current = shard.progress, shard.rounds.current
    for push in pushes:
        current.pushes[push.rank] = replace(push, round=progress.round + rounds)
    progress.take_step(clock, lr, current)
    if rounds % 2 == 0:
        shard.state.swap()  # as often as there are rounds
    shard.rounds.count("applied", None, rounds)
