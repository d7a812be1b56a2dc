"""Calls to Ray actors: their answers or errors of ours, made again where Ray loses them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from distnadam.backends.base import Pending
from distnadam.errors import (
    ClusterError,
    DistNadamError,
    LifecycleError,
    ShardLost,
    ShardUnavailable,
    StepTimeout,
    WorkerLost,
)

_AGAIN_S = 0.05


_K = TypeVar("_K")


def retry_until_answered(call: Callable[[], Any], *, timeout_s: float, first: Any = None) -> Any:
    """Return the answer of a call that does no harm twice, made again as long as Ray loses it;
    `first` is one on its way already.

    Raises:
        DistNadamError: what was raised there.
        StepTimeout: there was no answer in time.
        RayActorError: the actor is dead.
    """
    deadline, ref = time.monotonic() + timeout_s, first if first is not None else call()
    while True:
        try:
            return ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except ActorUnavailableError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_AGAIN_S)
            ref = call()
        except GetTimeoutError as error:
            raise StepTimeout(f"an actor did not answer in {timeout_s:g} s") from error
        except RayTaskError as error:
            raise own(error) from None


def all_answered(
    keys: Iterable[_K], call: Callable[[_K], Any], *, timeout_s: float
) -> dict[_K, Any]:
    """Return by key the answers of calls as `retry_until_answered` makes them, all at once."""
    asked = {key: call(key) for key in keys}
    return {
        key: retry_until_answered(partial(call, key), timeout_s=timeout_s, first=ref)
        for key, ref in asked.items()
    }


def retry_in_background(call: Callable[[], Any]) -> None:
    """Make a call that does no harm twice, and whose answer nobody waits for, again as long as Ray
    loses it.
    """

    def again() -> None:
        with contextlib.suppress(Exception):  # Ray was shut down, or the actor is gone
            retry_in_background(call)

    def done(future: Any) -> None:
        if isinstance(future.exception(), ActorUnavailableError):
            timer = threading.Timer(_AGAIN_S, again)
            timer.daemon = True
            timer.start()

    call().future().add_done_callback(done)


def own(error: RayTaskError) -> Exception:
    """Return the error of ours that an actor's call raised, however many actors it came through;
    else the given one.
    """
    cause: Any = error
    while isinstance(cause, RayTaskError) and cause.cause is not None:
        cause = cause.cause
    return cause if isinstance(cause, DistNadamError) else error


_SLICE_S = 0.05


_TRIES = 5


def gather_with_retry(
    calls: Mapping[int, Callable[[], Any]], timeout_s: float, ended: Callable[[], set[int]] = set
) -> dict[int, Any]:
    """Return the answers of calls that do no harm twice, as all that a supervisor says, made again
    where Ray lost them.

    Args:
        calls: by the index of a shard.
        timeout_s: after which a silent one is answered for by StepTimeout.
        ended: returns the indices of those that are known to have ended, which Ray takes seconds to
            tell.
    """
    answers: dict[int, Any] = {}
    for _ in range(_TRIES):
        again = [
            index
            for index in calls
            if index not in answers or isinstance(answers[index], ShardUnavailable)
        ]
        answers |= _gather({index: calls[index]() for index in again}, timeout_s, ended)
        if not any(isinstance(answer, ShardUnavailable) for answer in answers.values()):
            break
    return answers


def _gather(
    refs: dict[int, Any], timeout_s: float, ended: Callable[[], set[int]]
) -> dict[int, Any]:
    deadline, ready = time.monotonic() + timeout_s, set()
    while refs and time.monotonic() < deadline:
        awaited = [ref for index, ref in refs.items() if index not in ended()]
        ready = (
            set(ray.wait(awaited, num_returns=len(awaited), timeout=_SLICE_S)[0])
            if awaited
            else set()
        )
        if len(ready) == len(awaited):
            break
    answers: dict[int, Any] = {}
    for index, ref in refs.items():
        if ref in ready:
            answers[index] = _answer(index, ref)
        elif index in ended():
            answers[index] = ShardLost(f"shard {index}: its process ended")
        else:
            answers[index] = StepTimeout(f"shard {index} did not answer in {timeout_s:g} s")
    return answers


def _answer(index: int, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        ours = own(error)
        return ours if isinstance(ours, DistNadamError) else ClusterError(str(error))
    except ActorUnavailableError as error:
        return ShardUnavailable(f"shard {index}: {str(error).splitlines()[0]}")
    except (RayActorError, GetTimeoutError) as error:
        return ShardLost(f"shard {index}: its process or node died: {str(error).splitlines()[0]}")
    except Exception as error:
        return ClusterError(f"shard {index}: {type(error).__name__}: {error}")


def require_ray() -> None:
    """Raise where Ray was shut down: its functions would quietly start another, or join one that is
    dying.
    """
    if not ray.is_initialized():
        raise LifecycleError("the Ray that this optimizer ran on was shut down in this process")


def ignore_results(refs: Iterable[Any]) -> None:
    """Do without the answers of calls, and what they fail with: Ray shows its user every error that
    nobody asked for.
    """
    for ref in refs:
        ref.future()  # asks, and waits for nothing


class RayPending(Pending):
    """Object references of answers; `who` names in an error who should have given them."""

    def __init__(self, refs: dict[int, Any], who: str) -> None:
        self._refs, self._who = refs, who

    def result(self, timeout_s: float) -> dict[int, Any]:
        """See `Pending.result`."""
        require_ray()
        try:
            return self._get(timeout_s)
        except BaseException:
            ignore_results(self._refs.values())
            raise

    def _get(self, timeout_s: float) -> dict[int, Any]:
        try:
            return dict(
                zip(self._refs, ray.get(list(self._refs.values()), timeout=timeout_s), strict=True)
            )
        except GetTimeoutError as error:
            raise TimeoutError from error
        except RayTaskError as error:
            raise own(error) from None
        except ActorUnavailableError as error:
            raise ShardUnavailable(
                f"{self._who} {', '.join(map(str, self._refs))}: {str(error).splitlines()[0]}"
            ) from error
        except RayActorError as error:
            kind = ShardLost if self._who == "shard" else WorkerLost
            raise kind(
                f"{self._dead()}: its process or node died: {str(error).splitlines()[0]}"
            ) from error

    def _dead(self) -> str:
        ready, _ = ray.wait(list(self._refs.values()), num_returns=len(self._refs), timeout=0)
        dead = []
        for index, ref in self._refs.items():
            if ref in ready:
                try:
                    ray.get(ref)
                except RayActorError:
                    dead.append(str(index))
                except Exception:
                    continue
        return f"{self._who} {', '.join(dead)}"
