"""Calls to Ray actors: the one translation of Ray's exceptions, and the one retry of lost calls.

A call is lost if Ray cannot say whether the actor carried it out, or lost the answer: the actor may
be alive. Only idempotent calls are retried. Nothing here knows what the calls mean.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayError,
    RayTaskError,
)
from typing_extensions import override

from distnadam.backends.base import Pending
from distnadam.backends.ray.joined import (
    LOOK_EVERY_S,
    has_ray,
    ray_lost,
    require_ray,
    while_ray_lives,
    why_failed,
)
from distnadam.errors import (
    ClusterError,
    DistNadamError,
    InsufficientResources,
    RayLost,
    ShardLost,
    ShardUnavailable,
    StepTimeout,
)

_K = TypeVar("_K")

_PAUSE_S = 0.05
_ROOM_S = 15.0
_SLICE_S = 0.05
_TRIES = 5
_DEAD = re.compile(r"^\s+(pid|ip): (\S+)$", re.MULTILINE)
"""What a report of an actor's death says of its process."""


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Callee:
    """How errors name the actor that was called, and what they are.

    Attributes:
        who: what the messages begin with.
        died: raised if the actor died.
        unavailable: raised if the call was lost.
        remedy: what the messages of these two end with.
        restarts: whether Ray restarts the actor now that it died, so that a call may be retried.
    """

    who: str
    died: type[ClusterError] = ShardLost
    unavailable: type[ClusterError] = ShardUnavailable
    remedy: str = ""
    restarts: Callable[[], bool] = _never


ACTOR = Callee(who="an actor")


def shard_callee(index: object) -> Callee:
    """Return the callee of a shard, or of several by their indices in words."""
    return Callee(who=f"shard {index}")


def translate(error: Exception, callee: Callee) -> Exception:
    """Return our error for one of Ray's; any other error, a bug in the actor included, as it is.

    | Ray | ours |
    | --- | --- |
    | whatever it says once Ray itself died | RayLost |
    | RayTaskError | the DistNadamError that the actor raised |
    | ActorUnavailableError, ObjectLostError | `callee.unavailable` |
    | any other RayActorError | `callee.died` |
    | GetTimeoutError | StepTimeout |
    | ObjectStoreFullError, OutOfDiskError, also an actor's | InsufficientResources |
    """
    ours: Exception
    if isinstance(error, RayError) and (end := why_failed()) is not None:
        ours = ray_lost(end)
        ours.__cause__ = error
        return ours
    match error:
        case RayTaskError():  # first: Ray makes it an instance of its cause's class too
            if not isinstance(error.cause, ObjectStoreFullError | OutOfDiskError):
                return unwrap(error)
            ours = _no_room(callee)
        case ActorUnavailableError() | ObjectLostError():
            ours = callee.unavailable(f"{callee.who}: {_first_line(error)}{callee.remedy}")
        case RayActorError():
            ours = callee.died(
                f"{callee.who}: its process or node died{_of_death(error)}{callee.remedy}"
            )
        case ObjectStoreFullError() | OutOfDiskError():
            ours = _no_room(callee)
        case GetTimeoutError():
            ours = StepTimeout(f"{callee.who} did not answer in time")
        case _:
            return error
    ours.__cause__ = error
    return ours


def unwrap(error: RayTaskError) -> Exception:
    """Return our error that an actor's method raised, through however many actors, else `error`."""
    cause: Any = error
    while isinstance(cause, RayTaskError) and cause.cause is not None:
        cause = cause.cause
    return cause if isinstance(cause, DistNadamError) else error


def is_lost(error: BaseException | None) -> bool:
    """Whether a call ended in a way that leaves open if the actor carried it out."""
    return isinstance(error, (ActorUnavailableError, ObjectLostError)) and not isinstance(
        error, RayTaskError
    )


def _no_room(callee: Callee) -> InsufficientResources:
    return InsufficientResources(
        f"{callee.who}: Ray's object store has no room for what a call sends or returns, and the"
        " disk that takes the rest is full: free some of it, or start Ray's node with a larger"
        " store (ray start --object-store-memory)"
    )


def _of_death(error: Exception) -> str:
    """Return which process it was, and where, as far as Ray says so."""
    words = {"pid": "pid", "ip": "on"}
    found = " ".join(f"{words[what]} {value}" for what, value in _DEAD.findall(str(error)))
    return f" ({found})" if found else ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def retry_until_answered(
    call: Callable[[], Any], *, timeout_s: float, callee: Callee = ACTOR
) -> Any:
    """Return the answer of an idempotent call, repeated while it is lost.

    Raises:
        DistNadamError: what the actor raised, or as `translate` maps it.
        StepTimeout: no answer within `timeout_s`.
        RayLost: Ray itself died.
    """
    return retry_all_until_answered({0: call}, timeout_s=timeout_s, callee=lambda _: callee)[0]


def retry_all_until_answered(
    calls: Mapping[_K, Callable[[], Any]],
    *,
    timeout_s: float,
    callee: Callable[[_K], Callee] = shard_callee,
) -> dict[_K, Any]:
    """Return the answers of idempotent calls made at once, each repeated while it is lost.

    Raises:
        DistNadamError, StepTimeout: as `retry_until_answered`; the first in the order of `calls`.
    """
    answers = _gather(calls, timeout_s=timeout_s, callee=callee)
    for key in calls:
        if isinstance(answers[key], Exception):
            raise answers[key]
    return answers


def gather_with_retry(
    calls: Mapping[int, Callable[[], Any]],
    timeout_s: float,
    ended: Callable[[], Collection[int]] | None = None,
) -> dict[int, Any]:
    """Return each shard's answer or DistNadamError; a lost call is repeated a few times.

    Args:
        calls: an idempotent call by the index of its shard.
        timeout_s: after which a silent shard's answer is StepTimeout.
        ended: returns the indices of the shards whose process is known to have ended; Ray takes
            seconds to notice.
    """
    answers = _gather(calls, timeout_s=timeout_s, callee=shard_callee, tries=_TRIES, ended=ended)
    return {
        index: ClusterError(f"shard {index}: {type(answer).__name__}: {answer}")
        if isinstance(answer, Exception) and not isinstance(answer, DistNadamError)
        else answer
        for index, answer in answers.items()
    }


def _gather(
    calls: Mapping[_K, Callable[[], Any]],
    *,
    timeout_s: float,
    callee: Callable[[_K], Callee],
    tries: float = float("inf"),
    ended: Callable[[], Collection[_K]] | None = None,
) -> dict[_K, Any]:
    """Make all calls at once, repeat those that are lost, and return answers and errors."""
    deadline = time.monotonic() + timeout_s
    times = dict.fromkeys(calls, 1)
    refs = {key: make_call(call, callee(key)) for key, call in calls.items()}
    answers: dict[_K, Any] = {}
    while refs:
        gone = ended() if ended is not None else ()
        awaited = [ref for key, ref in refs.items() if key not in gone]
        left_s = max(0.0, deadline - time.monotonic())
        if ended is None:  # one that was lost is repeated while others are silent
            ready = wait_ready(awaited, left_s, at_least=1)
        else:
            ready = wait_ready(awaited, min(left_s, _SLICE_S))
        again = []
        for key, ref in list(refs.items()):
            late = time.monotonic() >= deadline
            if ref in ready:
                answers[key], lost = _outcome(ref, callee(key))
                if lost and times[key] < tries and not late:
                    again.append(key)
                    continue
            elif key in gone:
                answers[key] = callee(key).died(f"{callee(key).who}: its process ended")
            elif late:
                answers[key] = StepTimeout(f"{callee(key).who} did not answer in {timeout_s:g} s")
            else:
                continue
            del refs[key]
        if again:
            time.sleep(_PAUSE_S)
        for key in again:
            times[key] += 1
            refs[key] = make_call(calls[key], callee(key))
    return answers


def wait_ready(refs: list[Any], timeout_s: float, *, at_least: int | None = None) -> set[Any]:
    """Wait until so many are answered, all by default, for so long; return all that are."""
    if not refs:
        return set()
    deadline, number = time.monotonic() + timeout_s, at_least or len(refs)
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        ready = set(ray.wait(refs, num_returns=number, timeout=min(left_s, LOOK_EVERY_S))[0])
        if len(ready) >= number or left_s <= LOOK_EVERY_S:
            break
        require_ray()
    if len(ready) < len(refs):  # Ray returns no more than it was asked for
        ready |= set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
    return ready


def _outcome(ref: Any, callee: Callee) -> tuple[Any, bool]:
    """Return a call's answer or our error, and whether the call may be repeated."""
    try:
        return ray.get(ref), False
    except Exception as error:
        ours = translate(error, callee)
        if isinstance(ours, RayLost):
            return ours, False
        died = isinstance(error, RayActorError) and not isinstance(error, RayTaskError)
        return ours, is_lost(error) or (died and callee.restarts())


def make_call(call: Callable[[], Any], callee: Callee) -> Any:
    """Make a call, once the object store has room for its arguments; those of others leave it.

    Raises:
        InsufficientResources: it had none for 15 seconds.
    """
    deadline = time.monotonic() + _ROOM_S
    while True:
        try:
            return call()
        except (ObjectStoreFullError, OutOfDiskError) as error:
            if time.monotonic() >= deadline:
                raise translate(error, callee) from error
        require_ray()
        time.sleep(_PAUSE_S)


def retry_in_background(
    call: Callable[[], Any], *, on_death: Callable[[], None] | None = None
) -> None:
    """Make an idempotent call without waiting; repeat it while it is lost.

    Args:
        call: makes it.
        on_death: called, in another thread, once the actor died; until then the call is repeated
            after answers too. An actor keeps a call that it has not answered, and the connection
            that it came by, after its caller has died: let none be held for ever.
    """

    def again() -> None:
        with contextlib.suppress(Exception):  # Ray was shut down
            retry_in_background(call, on_death=on_death)

    def done(future: Any) -> None:
        error = future.exception()
        if is_lost(error) or (error is None and on_death is not None):
            timer = threading.Timer(_PAUSE_S, again)
            timer.daemon = True
            timer.start()
        elif on_death is not None:
            on_death()

    call().future().add_done_callback(done)


def ignore_results(refs: Iterable[Any]) -> None:
    """Drop the answers and errors of calls; Ray logs every error that is not fetched."""
    for ref in refs if has_ray() else ():
        ref.future()  # asks, and waits for nothing


@while_ray_lives()
def get_all(refs: list[Any], timeout_s: float) -> list[Any]:
    """Return all answers, or raise the first error, as `ray.get` does, or RayLost."""
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        try:
            answers: list[Any] = ray.get(refs, timeout=min(left_s, LOOK_EVERY_S))
        except GetTimeoutError as error:
            if left_s <= LOOK_EVERY_S or isinstance(error, RayTaskError):
                raise
            require_ray()
        else:
            return answers


class RayPending(Pending):
    """The object references of shards' answers, by index."""

    def __init__(self, refs: Mapping[int, Any]) -> None:
        self._refs = refs

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        refs = list(self._refs.values())
        try:
            return dict(zip(self._refs, get_all(refs, timeout_s), strict=True))
        except BaseException as error:
            ignore_results(refs)
            if isinstance(error, GetTimeoutError) and not isinstance(error, RayTaskError):
                raise TimeoutError from error
            if not isinstance(error, RayError):
                raise
            ours = translate(error, shard_callee(", ".join(map(str, self._failed()))))
            raise ours from ours.__cause__

    def _failed(self) -> list[int]:
        """Return the shards that are known to have died, or whose call or answer was lost."""
        ready = wait_ready(list(self._refs.values()), 0)
        failed = []
        for index, ref in self._refs.items():
            if ref in ready:
                try:
                    ray.get(ref)
                except RayTaskError as error:
                    if isinstance(unwrap(error), RayTaskError):
                        failed.append(index)
                except RayError:
                    failed.append(index)
        return failed
