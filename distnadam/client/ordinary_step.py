"""A worker's step in one go, where its push is the last that an ordinary round lacks; every other
is sent and waited for.
"""

from distnadam.backends.base import Refused
from distnadam.client.in_flight_push import InFlightPush
from distnadam.client.worker_session import WorkerSession
from distnadam.protocol.round_settings import ORDINARY


def step_at_once(session: WorkerSession, push: InFlightPush) -> None:
    """Send a push, and see its round through, if that is ordinary and lacks it alone; else leave it
    to be waited for, which sends it, perhaps again: it counts once.
    """
    session.in_flight = push  # before it is sent: what is raised may leave it half sent
    if push.rejection is not None or push.settings is not ORDINARY:
        return
    channel, number = session.channel, push.round
    try:
        ended = channel.step_at_once(
            push.epoch, session.rank, session.incarnation, number, push.parts(session.ranges)
        )
    except Exception as error:
        push.pending = Refused(error)
        return
    if ended is not None and ended.rewound == session.rewinds.known:
        session.stand(ended)
        session.is_readable = True
        session.in_flight = None
        push.ended = ended
