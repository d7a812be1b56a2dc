"""A worker's step in one go, where its push is the last that an ordinary round lacks; every other
is sent and waited for.
"""

from time import perf_counter
from typing import cast

from distnadam.backends.base import Pending, Refused
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.in_flight_push import InFlightPush
from distnadam.client.worker_session import WorkerSession
from distnadam.protocol.messages import RoundResult
from distnadam.protocol.round_settings import ORDINARY, RoundSettings


def step_at_once(
    session: WorkerSession,
    buffer: GradientBuffer,
    rejection: str | None,
    settings: RoundSettings,
) -> InFlightPush:
    """Push what a buffer has for the next round, and return the push: it has ended if the round is
    ordinary and lacked it alone; else it is to be waited for, which sends it, perhaps again, and it
    counts once.

    What the buffer has borrowed is copied if the push goes on, since its owner may change it then.
    """
    place = session.epoch, session.round + 1
    push = InFlightPush(*place, buffer.parts, rejection, True, settings)
    session.in_flight = push  # before it is sent: what is raised may leave it half sent
    try:
        if push.rejection is not None or not (settings is ORDINARY or settings.only_overrides):
            return push
        session.pushed_at = perf_counter()
        ended = session.channel.step_at_once(
            push.epoch,
            session.rank,
            session.incarnation,
            push.round,
            push.parts(session.ranges),
            push.settings,
        )
        if type(ended) is not RoundResult:
            push.pending = cast(Pending | None, ended)
        elif ended.rewound == session.rewinds.known:
            session.stand(ended)
            session.is_readable = True
            session.in_flight = None
            push.ended = ended
    except Exception as error:
        push.pending = Refused(error)
    finally:
        if buffer.is_lent:
            (buffer.keep if push.ended is None else buffer.release)()
    return push
