"""The short way of an ordinary push into its round: what `Shard.receive` does with one, in one
function, where nothing else is to be done. Pure.

It has no state of its own. What is not ordinary is left to `Shard.receive`, which alone says what
becomes of it; a test drives both with the same messages.
"""

from typing import Any

from distnadam.protocol.messages import Push
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.shard.machine import Shard
from distnadam.shard.phases import Phase
from distnadam.shard.round import Round, Waiter


def enter_push(shard: Shard, push: Push, caller: Any) -> bool | None:
    """Enter a push in the round in progress, and return whether the shard steps now, as `receive`
    would; None if the push must go there, and nothing was changed.
    """
    needed = members_if_ordinary(shard, push)
    if needed is None:
        return None
    current = shard.rounds.current
    pushes = current.pushes
    pushes[push.rank] = push
    if push.settings is not ORDINARY:
        current.is_ordinary = False
    current.waiting.append(Waiter(caller, push.rank, push.incarnation, push.want_parameters))
    for other in needed:
        if other not in pushes:
            return False
    current.overrides = push.settings.overrides  # those of all
    current.is_closed = True
    shard.enter(Phase.STEPPING)
    return True


def members_if_ordinary(shard: Shard, push: Push) -> tuple[int, ...] | None:
    """Return the ranks that the round of an ordinary push needs; None if the push is another.

    It is ordinary if it is current, the first of its rank, has no rejection and at most learning
    rates and betas for settings, which all pushes of the round so far have to the bit, and the
    round clips by no norm and nothing else waits for it to be entered.
    """
    rounds, progress, members = shard.rounds, shard.progress, shard.members
    current, rank, number = rounds.current, push.rank, push.round
    pushes = current.pushes
    if (
        shard.phase is not Phase.COLLECTING
        or number != progress.round + 1
        or push.epoch != progress.epochs.now
        or rank not in (needed := members.needed(number))
        or push.incarnation != members.ledger.newest[rank]
        or push.rejection is not None
        or rank in pushes
        or rank in current.superseded
        or number > shard.exclusive_hold.limit
        or shard.config.clips_by_norm
        or shard.loads.entries
        or members.given_up
        or not (
            current.is_ordinary if push.settings is ORDINARY else _are_alike(current, push.settings)
        )
    ):
        return None
    for waiter in current.waiting:
        if waiter.rank == rank:  # of an older worker, which is to be refused
            return None
    return needed


def _are_alike(current: Round, settings: RoundSettings) -> bool:
    """Whether settings are overrides alone, and those of every push of a round so far."""
    return settings.only_overrides and all(
        push.settings == settings and push.rejection is None for push in current.pushes.values()
    )
