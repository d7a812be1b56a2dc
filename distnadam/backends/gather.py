"""The answers of many actors at once, each an answer or an error of ours. For a supervisor, which must not wait for the dead."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from distnadam.backends.cluster import own
from distnadam.errors import ClusterError, DistNadamError, ShardLost, ShardUnavailable, StepTimeout

_SLICE_S = 0.05
_TRIES = 5


def insist_on(calls: Mapping[int, Callable[[], Any]], timeout_s: float, ended: Callable[[], set[int]] = set) -> dict[int, Any]:
    """Return the answers of calls that do no harm twice, as all that a supervisor says, made again where Ray lost them.

    Args:
        calls: by the index of a shard.
        timeout_s: after which a silent one is answered for by StepTimeout.
        ended: returns the indices of those that are known to have ended, which Ray takes seconds to tell.
    """
    answers: dict[int, Any] = {}
    for _ in range(_TRIES):
        again = [index for index in calls if index not in answers or isinstance(answers[index], ShardUnavailable)]
        answers |= _gather({index: calls[index]() for index in again}, timeout_s, ended)
        if not any(isinstance(answer, ShardUnavailable) for answer in answers.values()):
            break
    return answers


def _gather(refs: dict[int, Any], timeout_s: float, ended: Callable[[], set[int]]) -> dict[int, Any]:
    deadline, ready = time.monotonic() + timeout_s, set()
    while refs and time.monotonic() < deadline:
        awaited = [ref for index, ref in refs.items() if index not in ended()]
        ready = set(ray.wait(awaited, num_returns=len(awaited), timeout=_SLICE_S)[0]) if awaited else set()
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
