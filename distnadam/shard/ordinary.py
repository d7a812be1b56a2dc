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

_MOST_ELEMENTS = 1 << 20
"""Elements of a shard whose steps are so short that others may wait meanwhile; what the rounds of a
larger one cost is the step.
"""


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


def continues(last: msg.Push | msg.Step, message: msg.Push | msg.Step) -> bool:
    """Whether a message is the one that made up the round before, but for the round, and, of a
    direct step, which is one of the same handle, the number; its gradients lie in the same
    arrays. The message before was ordinary.
    """
    if (
        message.gradients is not last.gradients
        or message.round != last.round + 1
        or message.epoch != last.epoch
        or message.settings is not last.settings
        or message.rejection is not None
    ):
        return False
    if isinstance(message, msg.Step):
        return (
            isinstance(last, msg.Step)
            and message.incarnation == last.incarnation + 1
            and message.in_place == last.in_place
            and message.token is None
        )
    return (
        isinstance(last, msg.Push)
        and message.rank == last.rank
        and message.incarnation == last.incarnation
        and not message.want_parameters
        and not message.slices
    )


def may_go_ahead(shard: Shard, messages: Sequence[msg.Push | msg.Step]) -> bool:
    """Whether every round from the next on is one of `count_ahead`, as long as these workers push
    alike, or such direct steps come, and the shard gets no other message.
    """
    if sum(end - begin for begin, end in shard.spec.ranges.values()) > _MOST_ELEMENTS:
        return False
    rounds, progress, hold = shard.rounds, shard.progress, shard.exclusive_hold
    current, members, number = rounds.current, shard.members, shard.progress.round + 1
    if (
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
        or any(
            each.settings is not ORDINARY
            or each.rejection is not None
            or each.epoch != progress.epochs.now
            for each in messages
        )
    ):
        return False
    pushes = [each for each in messages if isinstance(each, msg.Push)]
    if len(pushes) < len(messages):
        return all(each.token is None for each in messages if isinstance(each, msg.Step))
    first, ranks = members.schedule[-1]
    return not (
        first > number
        or sorted(ranks) != sorted([push.rank for push in pushes])
        or any(
            push.want_parameters
            or push.slices
            or push.incarnation != members.ledger.newest[push.rank]
            for push in pushes
        )
    )


def count_ahead(
    shard: Shard,
    messages: Sequence[msg.Push | msg.Step],
    rounds: int,
    clock: Clock,
    lr: float,
) -> None:
    """Count so many rounds that were stepped one after the other while `may_go_ahead` held, each by
    these messages but for their round; the clock and the learning rate are those of the last, and
    so is a step's number.
    """
    progress, current = shard.progress, shard.rounds.current
    for message in messages:
        if isinstance(message, msg.Step):
            shard.rounds.enter_direct(message)
        else:
            current.pushes[message.rank] = replace(message, round=progress.round + rounds)
    progress.take_step(clock, lr, current)
    if rounds % 2 == 0 and not current.in_place:
        shard.state.swap()  # as often as there are rounds
    shard.rounds.count("applied", None, rounds)
