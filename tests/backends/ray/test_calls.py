"""Ray's errors as ours, and the retry of lost calls, with actors that fail, die and are silent."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayTaskError,
)

from distnadam.backends.ray.calls import (
    Callee,
    RayPending,
    gather_with_retry,
    is_lost,
    retry_all_until_answered,
    retry_in_background,
    retry_until_answered,
    shard_callee,
    translate,
    unwrap,
)
from distnadam.errors import (
    ClusterError,
    Rewound,
    ShardLost,
    ShardUnavailable,
    StepTimeout,
    Unrecoverable,
    WorkerLost,
)
from tests.eventually import eventually

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]


class Actor:
    """Answers, refuses, fails, is silent, or ends its process."""

    def __init__(self) -> None:
        self._calls = 0

    async def add(self) -> int:
        self._calls += 1
        return self._calls

    async def calls(self) -> int:
        return self._calls

    async def refuse(self) -> None:
        raise Rewound("all shards went back", epoch=4, step=7)

    async def pass_on(self, other: Any) -> None:
        await other.refuse.remote()

    async def fail(self) -> None:
        raise ValueError("a bug")

    async def lose(self) -> None:
        raise ActorUnavailableError("another actor's call was lost", b"0" * 16)

    async def be_silent(self) -> None:
        await asyncio.Event().wait()

    async def die(self) -> None:
        os._exit(1)


class LastingActor:
    """An actor that goes on from test to test, or its successor if a test killed it."""

    def __init__(self) -> None:
        self._actor: Any = None

    def get(self) -> Any:
        """Return the actor, started."""
        with suppress(ActorDiedError):
            if self._actor is not None:
                ray.get(self._actor.calls.remote())
                return self._actor
        self._actor = ray.remote(Actor).options(num_cpus=0).remote()  # type: ignore[attr-defined]
        ray.get(self._actor.calls.remote())
        return self._actor


@pytest.fixture(scope="module")
def lasting_actors(one_process: None) -> Iterator[tuple[LastingActor, LastingActor]]:
    actors = (LastingActor(), LastingActor())
    yield actors
    for actor in actors:
        ray.kill(actor.get())


@pytest.fixture
def actor(ray_cluster: None, lasting_actors: tuple[LastingActor, LastingActor]) -> Any:
    return lasting_actors[0].get()


@pytest.fixture
def other(ray_cluster: None, lasting_actors: tuple[LastingActor, LastingActor]) -> Any:
    return lasting_actors[1].get()


def end(actor: Any) -> None:
    """Kill an actor, and wait until it answers no more: a call may overtake the kill."""
    ray.kill(actor)
    with suppress(ActorDiedError):
        while True:
            ray.get(actor.calls.remote())


def died() -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg += "\n\tclass_name: Some\n\tpid: 77\n\tip: 10.0.0.1\nIts process has died."
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ActorUnavailableError("broken pipe", b"0" * 16), ShardUnavailable, "shard 3: .*broken"),
        (ObjectLostError("ab", "owner", "site"), ShardUnavailable, "shard 3: .*ab"),
        (ActorDiedError(), ShardLost, "shard 3: its process or node died$"),
        (died(), ShardLost, r"shard 3: its process or node died \(pid 77 on 10\.0\.0\.1\)$"),
        (GetTimeoutError("late"), StepTimeout, "shard 3 did not answer in time"),
    ],
)
def test_each_of_rays_errors_is_one_of_ours_that_names_the_shard_and_the_cause(
    error: Exception, kind: type[Exception], message: str
) -> None:
    ours = translate(error, shard_callee(3))
    assert type(ours) is kind
    assert ours.__cause__ is error
    with pytest.raises(kind, match=message):
        raise ours


def test_a_callee_chooses_its_own_errors_and_remedy() -> None:
    callee = Callee(who="it", died=WorkerLost, unavailable=Unrecoverable, remedy="; start it again")
    assert type(translate(ActorDiedError(), callee)) is WorkerLost
    assert str(translate(ActorDiedError(), callee)).endswith("; start it again")
    assert type(translate(ActorUnavailableError("x", b"0" * 16), callee)) is Unrecoverable


def test_an_error_that_is_not_rays_stays_what_it_is() -> None:
    error = OSError("disk full")
    assert translate(error, shard_callee(0)) is error


def test_our_error_comes_whole_through_two_actors(actor: Any, other: Any) -> None:
    with pytest.raises(RayTaskError) as caught:
        ray.get(actor.pass_on.remote(other))
    error = unwrap(caught.value)
    assert isinstance(error, Rewound)
    assert (str(error), error.epoch, error.step) == ("all shards went back", 4, 7)
    with pytest.raises(Rewound, match="went back"):
        retry_until_answered(partial(actor.pass_on.remote, other), timeout_s=60)


def test_a_bug_in_an_actor_is_raised_as_it_is_and_gathered_as_a_cluster_error(actor: Any) -> None:
    with pytest.raises(ValueError, match="a bug"):
        retry_until_answered(actor.fail.remote, timeout_s=60)
    answer = gather_with_retry({5: actor.fail.remote}, 60)[5]
    assert type(answer) is ClusterError
    assert "shard 5" in str(answer) and "a bug" in str(answer)


def test_an_error_that_an_actor_raises_is_its_answer_and_not_a_lost_call(actor: Any) -> None:
    with pytest.raises(RayTaskError, match="another actor's call was lost") as caught:
        retry_until_answered(actor.lose.remote, timeout_s=60)
    assert not is_lost(caught.value)


def test_a_call_to_a_dead_actor_is_not_retried(actor: Any) -> None:
    end(actor)
    made = []

    def call() -> Any:
        made.append(1)
        return actor.add.remote()

    with pytest.raises(WorkerLost, match="worker 2: its process or node died"):
        retry_until_answered(call, timeout_s=60, callee=Callee(who="worker 2", died=WorkerLost))
    assert len(made) == 1


def test_a_call_to_an_actor_that_ray_restarts_is_retried_until_it_answers() -> None:
    options = {"num_cpus": 0, "max_restarts": 1, "max_task_retries": 0}
    actor = ray.remote(Actor).options(**options).remote()  # type: ignore[attr-defined]
    assert ray.get(actor.add.remote()) == 1
    dying = [actor.die.remote()]

    def call() -> Any:
        return dying.pop() if dying else actor.add.remote()

    callee = Callee(who="it", restarts=lambda: True)
    assert retry_until_answered(call, timeout_s=60, callee=callee) == 1  # a new process counts
    end(actor)


def test_what_tells_that_an_actor_is_not_restarted_may_raise_instead(actor: Any) -> None:
    end(actor)

    def restarts() -> bool:
        raise Unrecoverable("it was stopped")

    callee = Callee(who="it", restarts=restarts)
    with pytest.raises(Unrecoverable, match="it was stopped"):
        retry_until_answered(actor.add.remote, timeout_s=60, callee=callee)


def test_a_silent_actor_is_a_timeout_that_names_it(actor: Any, other: Any) -> None:
    with pytest.raises(StepTimeout, match=r"an actor did not answer in 0\.05 s"):
        retry_until_answered(actor.be_silent.remote, timeout_s=0.05)
    answers = gather_with_retry({0: actor.be_silent.remote, 1: other.calls.remote}, 0.5)
    assert answers[1] == ray.get(other.calls.remote())
    assert isinstance(answers[0], StepTimeout)
    assert str(answers[0]) == "shard 0 did not answer in 0.5 s"


def test_shards_known_to_have_ended_are_not_waited_for(actor: Any, other: Any) -> None:
    calls = {0: actor.be_silent.remote, 1: other.add.remote}
    answers = gather_with_retry(calls, 3600.0, lambda: {0})
    assert answers[1] == ray.get(other.calls.remote())
    assert isinstance(answers[0], ShardLost)
    assert str(answers[0]) == "shard 0: its process ended"


def test_of_several_calls_the_first_error_in_order_is_raised(actor: Any, other: Any) -> None:
    calls = {0: actor.add.remote, 1: partial(actor.pass_on.remote, other), 2: actor.fail.remote}
    with pytest.raises(Rewound):
        retry_all_until_answered(calls, timeout_s=60)
    answers = retry_all_until_answered({"a": actor.add.remote}, timeout_s=60)
    assert answers == {"a": ray.get(actor.calls.remote())}


def test_a_pending_answer_names_the_shards_that_died_and_no_other(actor: Any, other: Any) -> None:
    end(actor)
    pending = RayPending({4: other.add.remote(), 7: actor.add.remote()})
    with pytest.raises(ShardLost, match="shard 7: its process or node died") as caught:
        pending.result(60)
    assert caught.value.__cause__ is not None


def test_a_pending_answer_that_is_late_may_be_waited_for_again(actor: Any, other: Any) -> None:
    pending = RayPending({0: other.add.remote(), 1: actor.be_silent.remote()})
    with pytest.raises(TimeoutError):
        pending.result(0.05)
    end(actor)
    with pytest.raises(ShardLost, match="shard 1"):
        pending.result(60)


def test_a_pending_answer_raises_what_the_shard_refused_with(actor: Any) -> None:
    with pytest.raises(Rewound) as caught:
        RayPending({0: actor.refuse.remote()}).result(60)
    assert caught.value.step == 7


ANSWER_OF_A_DEAD_NODE = """
import numpy as np
import ray
from ray.cluster_utils import Cluster

from distnadam.backends.ray.calls import RayPending
from distnadam.errors import ShardUnavailable

head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=head)
node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
ray.init(address=cluster.address, log_to_driver=False)

class Shard:
    def parameters(self):
        return np.ones(10**6, np.float32)

ref = ray.remote(Shard).options(num_cpus=1).remote().parameters.remote()
ray.wait([ref], fetch_local=False)
cluster.remove_node(node, allow_graceful=False)
try:
    RayPending({2: ref}).result(100)
except ShardUnavailable as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.nightly
def test_an_answer_whose_node_died_before_it_was_fetched_is_a_lost_call() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_OF_A_DEAD_NODE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "shard 2: Failed to retrieve object" in done.stdout, done.stderr


@pytest.mark.parametrize("method", ["be_silent", "add"])
def test_the_end_of_an_actor_ends_a_call_in_the_background_that_is_repeated_after_answers(
    method: str, actor: Any
) -> None:
    ended = threading.Event()
    retry_in_background(getattr(actor, method).remote, on_death=ended.set)
    eventually(lambda: method == "be_silent" or ray.get(actor.calls.remote()) > 2)
    assert not ended.is_set()
    end(actor)
    assert ended.wait(60)


RULE = {"num_failures": 3, "req_failure_prob": 0, "resp_failure_prob": 0}


def lose_calls() -> None:
    """Make each kind of call to one actor of a running Ray; print what it counted after each."""
    ray.init(log_to_driver=False)
    actor = ray.remote(Actor).options(num_cpus=0).remote()  # type: ignore[attr-defined]
    kind = sys.argv[1]
    if kind == "until answered":
        print(retry_until_answered(actor.add.remote, timeout_s=60))
    elif kind == "gathered":
        print(gather_with_retry({0: actor.add.remote}, 60)[0])
    elif kind == "in the background":
        retry_in_background(actor.add.remote)
        while not (done := retry_until_answered(actor.calls.remote, timeout_s=60)):
            pass
        print(done)
    else:
        with pytest.raises(ShardUnavailable, match="shard 6"):
            RayPending({6: actor.add.remote()}).result(60)
        print("refused")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("until answered", marks=pytest.mark.nightly),
        "pending",
        pytest.param("gathered", marks=pytest.mark.nightly),
        pytest.param("in the background", marks=pytest.mark.nightly),
    ],
)
def test_a_call_that_ray_loses_on_its_way_is_made_again(kind: str) -> None:
    rule = {"CoreWorkerService.grpc_client.PushTask": RULE | {"req_failure_prob": 100}}
    env = os.environ | {
        "RAY_testing_rpc_failure": json.dumps(rule),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.ray.test_calls", kind],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused" if kind == "pending" else "1"]


if __name__ == "__main__":
    lose_calls()
