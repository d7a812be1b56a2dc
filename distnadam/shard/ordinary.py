"""A round that is ordinary, closed and ended by the caller's own thread: all members push in one
epoch, nobody holds the shard or waits to, no norms are needed. Pure.

Nearly every round is. Nothing is decided here: a round is entered, counted and begun anew by the
same `Rounds` and `Progress`, and whatever is not ordinary goes to `Shard.receive`.
"""

import distnadam.protocol.messages as msg
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.round_settings import ORDINARY
from distnadam.shard.effects import Effect, Work
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary_push import members_if_ordinary
from distnadam.shard.phases import Phase


def close(shard: Shard, message: msg.Push | msg.Step) -> bool:
    """Enter the push that the round in progress still lacks, or a step from outside, and close the
    round for its step; return False, with nothing changed, unless it is ordinary.

    Nobody waits for that push: its caller learns of the round's end by `end`.
    """
    current = shard.rounds.current
    if isinstance(message, msg.Step):
        if not _is_ordinary(shard, message):
            return False
        shard.rounds.enter_direct(message)
    else:
        pushes = current.pushes
        if message.want_parameters or (needed := members_if_ordinary(shard, message)) is None:
            return False
        if len(pushes) + 1 != len(needed) or (pushes and not pushes.keys() <= set(needed)):
            return False
        pushes[message.rank] = message
        if message.settings is not ORDINARY:
            current.is_ordinary = False
    current.overrides = message.settings.overrides  # those of all
    current.is_closed = True
    shard.enter(Phase.STEPPING)
    return True


def _is_ordinary(shard: Shard, step: msg.Step) -> bool:
    """Whether a step from outside is current, holds no shard, and has no norms, and no settings
    but overrides, and nobody else acts.
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


def end(shard: Shard, clock: Clock, lr: float) -> list[Effect]:
    """Take the result of the step of a round that `close` closed: end the round, begin the next."""
    rounds, hold = shard.rounds, shard.exclusive_hold
    if (
        rounds.current.waiting
        or rounds.pulls
        or hold.queue
        or shard.loads.entries
        or shard.members.given_up
        or shard.phase is not Phase.STEPPING
    ):
        return shard.computed(Work.STEP, (clock, lr))
    shard.progress.take_step(clock, lr, rounds.current)
    rounds.count("applied", None)
    shard.enter(Phase.COLLECTING)
    return []
