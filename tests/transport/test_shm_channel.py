"""A worker's and a shard's end of shared memory: real shards behind real sockets, all in here."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.errors import LaneError, ShardLost, SupersededWorker
from distnadam.protocol.messages import Describe, Pull
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_server import parameter_arena
from distnadam.transport.unix_connection import connect
from tests.transport.shm_shards import CUTS, LAYOUT, PARAMS, Client, Shard, Shards


@pytest.fixture
def shards() -> Iterator[Shards]:
    shards = Shards()
    yield shards
    shards.close()


def test_pushes_of_two_workers_step_all_shards_and_both_see_the_same_parameters(
    shards: Shards,
) -> None:
    clients = [shards.client(rank) for rank in range(2)]
    assert all(client.shm.complete for client in clients)
    numbers = [client.push(1.0 + client.rank) for client in clients]
    answers = [client.collect(number) for client, number in zip(clients, numbers, strict=True)]
    assert {(a.outcome, a.round) for each in answers for a in each.values()} == {("applied", 1)}
    seen = [c.shm.parameters[a[0].buffer]["float32"] for c, a in zip(clients, answers, strict=True)]
    with DistNadam(backend="local").build({"w": PARAMS["float32"]}) as optimizer:
        optimizer.apply_gradients({"w": np.full(3000, 1.5, np.float32)})
        expected = optimizer.get_params()["w"].tobytes()
    assert seen[0].tobytes() == seen[1].tobytes() == expected
    with pytest.raises(ValueError, match="read-only"):
        seen[0][0] = 1
    part = clients[0].shm.parameters_of(1, answers[0][1])["float32"]
    assert part.tobytes() == seen[0][CUTS[1]["float32"][0] :].tobytes()


def test_gradients_in_half_precision_lie_at_the_arenas_beginning(shards: Shards) -> None:
    clients = [shards.client(rank) for rank in range(2)]
    halves = [client.push(0.5, dtype="float16") for client in clients]
    first = clients[0].collect(halves[0])
    half = clients[0].shm.parameters[first[0].buffer]["float32"].tobytes()
    other = Shards()
    whole_clients = [other.client(rank) for rank in range(2)]
    wholes = [client.push(0.5) for client in whole_clients]
    second = whole_clients[0].collect(wholes[0])
    assert half == whole_clients[0].shm.parameters[second[0].buffer]["float32"].tobytes()


def test_answers_that_are_late_may_be_collected_again(shards: Shards) -> None:
    clients = [shards.client(rank) for rank in range(2)]
    number = clients[0].push(1.0)
    with pytest.raises(TimeoutError):
        clients[0].collect(number, timeout_s=0.05)
    clients[1].push(1.0)
    assert sorted(clients[0].collect(number)) == [0, 1]


def test_answers_to_an_earlier_post_are_dropped(shards: Shards) -> None:
    clients = [shards.client(rank) for rank in range(2)]
    clients[0].push(1.0)
    again = clients[0].push(1.0)
    clients[1].push(1.0)
    assert {answer.round for answer in clients[0].collect(again).values()} == {1}
    pull = Pull(rank=0, incarnation=clients[0].incarnation)
    number = clients[0].shm.post({0: pull, 1: pull})
    assert {answer.round for answer in clients[0].collect(number).values()} == {1}
    with pytest.raises(TypeError, match="Describe does not travel"):
        clients[0].shm.post({0: Describe()})


def test_a_refusal_is_raised(shards: Shards) -> None:
    client = shards.client(0)
    shards.join(0)
    number = client.push(1.0)
    with pytest.raises(SupersededWorker):
        client.collect(number)


def test_a_shards_end_is_told_at_once_and_its_channel_is_gone(shards: Shards) -> None:
    client = shards.client(0)
    number = client.push(1.0)
    shards.all[1].server.close()
    with pytest.raises(ShardLost, match="shard 1: its process died"):
        client.collect(number)
    assert 0 in client.shm and 1 not in client.shm
    assert not client.shm.complete


def test_a_client_that_is_dropped_or_closed_has_left_and_is_not_dead(shards: Shards) -> None:
    client = shards.client(1)
    del client
    shards.wait("left")
    client = shards.client(1)
    views = client.shm.gradients["float32"]
    client.shm.close()
    shards.wait("left")
    views[:] = 1
    assert not any(shard.describe().dead for shard in shards.all)


DYING = """
import os, signal, sys
from distnadam.transport.unix_connection import Address
from distnadam.transport.shm_channel import ShmClient
cuts = [{"float32": (0, 1500)}, {"float32": (1500, 3000)}]
client = ShmClient({"float32": 3000}, cuts, 1, int(sys.argv[1]))
client.gradients["float32"][:] = 4
for shard in range(2):
    client.open(shard, Address(*sys.argv[2 + 2 * shard:4 + 2 * shard]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_workers_death_is_told_and_its_gradients_stay_readable(shards: Shards) -> None:
    incarnation = shards.join(1)
    addresses = [shard.server.address for shard in shards.all]
    arguments = [part for address in addresses for part in (address.name, address.token)]
    subprocess.run([sys.executable, "-c", DYING, str(incarnation), *arguments], check=False)
    shards.wait("dead")
    server = shards.all[1].server
    left = server.gradients_of(1, incarnation, {"float32": "float32"})
    assert left is not None
    assert left["float32"].tolist() == [4.0] * (CUTS[1]["float32"][1] - CUTS[1]["float32"][0])
    assert server.gradients_of(1, incarnation + 1, {"float32": "float32"}) is None
    assert server.gradients_of(0, incarnation, {"float32": "float32"}) is None


def test_a_message_of_another_worker_ends_the_channel_it_came_through(shards: Shards) -> None:
    client, other = shards.client(0), shards.client(1)
    client.rank, rank = 1, client.rank
    number = client.push(1.0)
    with pytest.raises(ShardLost):
        client.collect(number)
    client.rank = rank
    number = other.push(1.0)
    with pytest.raises(TimeoutError):
        other.collect(number, timeout_s=0.05)  # it waits for rank 0, and was not disturbed


def test_a_reset_client_reaches_the_shards_as_another_incarnation(shards: Shards) -> None:
    client, other = shards.client(0), shards.client(1)
    memory = client.shm.gradients["float32"]
    client.incarnation = shards.join(0)
    client.shm.reset(CUTS, client.incarnation)
    assert not client.shm.complete and 0 not in client.shm
    for index, shard in enumerate(shards.all):
        client.shm.open(index, shard.server.address)
    other.push(1.0)
    assert {a.outcome for a in client.collect(client.push(1.0)).values()} == {"applied"}
    assert client.shm.gradients["float32"] is memory


def test_shards_of_another_arena_are_refused_while_a_neighbour_is_connected(
    shards: Shards,
) -> None:
    stranger = Shard(1, None)
    client = Client(0, shards.join(0))
    client.shm.open(0, shards.all[0].server.address)
    with pytest.raises(LaneError, match="shard 1 keeps its parameters in another arena"):
        client.shm.open(1, stranger.server.address)
    client.shm.drop(0)
    client.shm.open(1, stranger.server.address)
    assert client.shm.parameters[0]["float32"][-1] == 1.0


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("sizes", "copies", "message"),
    [
        (None, 0, "expected one arena, got 0"),
        (LAYOUT.sizes, 2, "expected one arena, got 2"),
        ({"float32": 10**6}, 1, "bytes of sealed shared memory"),
    ],
)
def test_a_greeting_without_the_right_memory_is_refused_and_the_shard_serves_on(
    shards: Shards, sizes: dict[str, int] | None, copies: int, message: str
) -> None:
    address = shards.all[0].server.address
    arenas = [Arena.create(sizes) for _ in range(copies) if sizes is not None]
    before = open_descriptors()
    greeting: dict[str, Any] = {"rank": 0, "incarnation": 1}
    with pytest.raises(LaneError, match=message):
        connect(address, greeting, [arena.fd for arena in arenas])
    while open_descriptors() > before:
        pass  # the test's time limit bounds it
    assert shards.client(0).shm.complete


def test_the_memory_of_a_neighbour_that_is_gone_cannot_be_joined(shards: Shards) -> None:
    shard = shards.all[1]
    shard.server.close()
    with pytest.raises(LaneError, match="no lane to the socket"):
        parameter_arena(shard.spec, shard.server.address)
