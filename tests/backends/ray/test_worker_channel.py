"""Workers of a node whose shards are on others: by the node's relay, and by the transport where
there is none; real shards behind real sockets, all in this process.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.backends.ray.address import ProcessAddress, Relayed
from distnadam.backends.ray.worker_channel import ChannelOwner, RayWorkerChannel
from distnadam.config import Options
from distnadam.errors import LaneError, StaleEpoch
from distnadam.protocol.messages import Describe
from distnadam.tensors.layout import Layout, Ranges
from distnadam.transport.far_shard import Reach
from distnadam.transport.relay import Relay
from distnadam.transport.shared_memory import Arena
from distnadam.transport.tcp_server import TcpServer
from distnadam.worker import Worker

PARAMS = {"w": np.linspace(-1, 1, 100_000, dtype=np.float32)}
ANSWER_S = 60.0


class Far:
    """An optimizer whose shards are on another node, as that of its workers sees it."""

    def __init__(self, num_workers: int = 1, **how: Any) -> None:
        self.optimizer = DistNadam(
            num_shards=2, num_workers=num_workers, backend="local", **how
        ).build(PARAMS)
        self.transport: Any = self.optimizer.shards.backend.transport
        self.transport.open_channel = self._channel
        self.transport.await_recovery = lambda timeout_s: None  # no shard dies here
        self.servers: list[TcpServer] = []
        self.relays: list[Relay] = []
        self.carried: list[Any] = []
        self.why: LaneError | None = None
        self._listen()
        self.new_relay()

    def _listen(self) -> None:
        self.hosts = list(self.transport.hosts)
        self.servers += [
            TcpServer(host.shard.spec, host.deliver, "127.0.0.1", None) for host in self.hosts
        ]

    def new_relay(self) -> None:
        """End the node's relay, if any, and begin another, with memory of its own."""
        if self.relays:
            self.relays[-1].close()
        relay = Relay(2, Arena.create(self.optimizer.shards.layout.sizes, copies=2))
        for host, server in zip(self.hosts, self.servers[-len(self.hosts) :], strict=True):
            relay.serve(host.shard.spec, self._reach(host, server))
        relay.await_connections(range(len(self.hosts)), ANSWER_S)
        self.relays.append(relay)

    def reshard(self, num_shards: int) -> None:
        """Move the shards to others, whereupon the former processes end."""
        self.optimizer.reshard(num_shards)
        self._listen()
        self.new_relay()

    def _reach(self, host: Any, server: TcpServer) -> Reach:
        def carry(message: Any, reply: Any) -> None:
            self.carried.append(message)
            host.deliver(message, reply)

        return Reach(find=lambda: server.endpoint, carry=carry)

    def _relayed(self) -> Mapping[int, Relayed | LaneError]:
        if self.why is not None:
            raise self.why
        relay = self.relays[-1]
        return {
            index: Relayed(socket=relay.address(index), by_tcp=relay.is_by_tcp(index))
            for index in range(len(self.hosts))
        }

    def _channel(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> RayWorkerChannel:
        owner = ChannelOwner(
            node="here",
            rank=rank,
            sizes=layout.sizes,
            addresses=lambda: [
                ProcessAddress("there", pid=index + 1) for index in range(len(self.transport.hosts))
            ],
            relayed=self._relayed,
        )
        return RayWorkerChannel(self.transport, owner, ranges, incarnation)

    def close(self) -> None:
        for relay in self.relays:
            relay.close()
        for server in self.servers:
            server.close()
        self.optimizer.close()


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.close()


def gradient(round: int, rank: int = 0) -> dict[str, Any]:
    return {"w": np.sin(np.arange(100_000) + round + 7 * rank).astype(np.float32)}


def right(*rounds: int) -> Any:
    with DistNadam(backend="local").build(PARAMS) as optimizer:
        for round in rounds:
            optimizer.apply_gradients(gradient(round))
        return optimizer.get_params()["w"]


def is_right(read: Any, *rounds: int) -> bool:
    equal: bool = read["w"].tobytes() == right(*rounds).tobytes()
    return equal


def test_workers_read_views_of_their_nodes_memory_and_the_way_is_logged(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distnadam")
    worker = far.optimizer.worker(0)
    for round in (1, 2, 3):
        stepped = worker.step(gradient(round))
    assert is_right(stepped, 1, 2, 3)
    assert not stepped["w"].flags.owndata
    assert np.shares_memory(stepped["w"], worker.parameters()["w"])
    assert "shards none by shared memory (same node), shards [0, 1] by TCP" in caplog.text
    assert far.carried == []


def test_the_first_look_of_a_worker_fetches_what_others_have_stepped(far: Far) -> None:
    far.optimizer.apply_gradients(gradient(1))
    worker = far.optimizer.worker(0)
    assert worker.round == 1, "asked before there is any channel"
    assert is_right(worker.parameters(), 1)
    assert is_right(worker.step(gradient(2)), 1, 2)


def test_a_pull_fetches_what_was_stepped_and_replaced_without_the_worker(far: Far) -> None:
    worker = far.optimizer.worker(0)
    worker.step(gradient(1))
    far.optimizer.apply_gradients(gradient(2))
    assert is_right(worker.pull(), 1, 2)
    ones = {"w": np.ones(100_000, np.float32)}
    far.optimizer.set_params(ones)
    with pytest.raises(StaleEpoch):
        worker.step(gradient(3))
    assert worker.pull()["w"].tobytes() == ones["w"].tobytes()
    assert worker.parameters()["w"].tobytes() == ones["w"].tobytes()


def test_a_push_that_did_not_ask_for_parameters_leaves_them_to_be_read(far: Far) -> None:
    worker = far.optimizer.worker(0)
    worker.push(gradient(1)).result()
    assert is_right(worker.parameters(), 1)
    worker.gradients()["w"][:] = gradient(2)["w"]
    worker.step()
    worker.push_tensor("w", gradient(3)["w"])
    worker.push().result()
    assert is_right(worker.parameters(), 1, 2, 3)


@pytest.mark.parametrize("first", ["parameters", "pull", "step", "push", "ticket"])
def test_a_new_relay_has_nothing_and_whatever_reads_first_has_it_fetched(
    first: str, far: Far
) -> None:
    worker = far.optimizer.worker(0)
    worker.step(gradient(1))
    done = [1]
    ticket = None
    if first == "ticket":
        ticket = worker.push(gradient(2))
    far.new_relay()
    match first:
        case "step":
            read = worker.step(gradient(2))
            done = [1, 2]
        case "push":
            worker.push(gradient(2)).result()
            read = worker.parameters()
            done = [1, 2]
        case "ticket":
            assert ticket is not None
            ticket.result()
            read = worker.parameters()
            done = [1, 2]
        case _:
            read = getattr(worker, first)()
    assert is_right(read, *done)
    assert is_right(worker.step(gradient(3)), *done, 3)


def test_the_relay_of_a_new_worker_in_another_process_begins_empty_too(far: Far) -> None:
    far.optimizer.worker(0).step(gradient(1))
    far.new_relay()
    successor = far.optimizer.worker(0)
    successor.gradients()  # opens the channel, and asks nothing
    assert successor.round == 1
    assert is_right(successor.parameters(), 1)


def test_workers_of_one_node_share_what_comes(caplog: pytest.LogCaptureFixture) -> None:
    far = Far(num_workers=2)
    workers = [far.optimizer.worker(rank) for rank in (0, 1)]
    read: dict[int, Any] = {}

    def steps(worker: Worker) -> None:
        for round in (1, 2, 3):
            read[worker.rank] = worker.step(gradient(round, worker.rank))

    threads = [threading.Thread(target=steps, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read[0]["w"].tobytes() == read[1]["w"].tobytes()
    with DistNadam(backend="local").build(PARAMS) as one:
        for round in (1, 2, 3):
            both = [gradient(round, rank)["w"] for rank in (0, 1)]
            one.apply_gradients({"w": (both[0] + both[1]) / np.float32(2)})
        assert one.get_params()["w"].tobytes() == read[0]["w"].tobytes()
    far.close()


@pytest.mark.parametrize("how", [{"global_clipnorm": 0.5}, {"clipnorm": 0.1}])
def test_norms_take_two_phases_through_the_relay_and_over_its_end(how: dict[str, Any]) -> None:
    far = Far(**how)
    worker = far.optimizer.worker(0)
    with DistNadam(backend="local", **how).build(PARAMS) as one:
        for round in (1, 2):
            one.apply_gradients(gradient(round))
            assert worker.step(gradient(round))["w"].tobytes() == one.get_params()["w"].tobytes()
            far.new_relay()
    far.close()


def test_after_a_reshard_the_relay_stands_for_the_new_shards(far: Far) -> None:
    worker = far.optimizer.worker(0)
    worker.step(gradient(1))
    far.reshard(3)
    assert is_right(worker.step(gradient(2)), 1, 2)
    assert is_right(worker.pull(), 1, 2)
    far.reshard(1)
    assert is_right(worker.pull(), 1, 2)
    assert is_right(worker.step(gradient(3)), 1, 2, 3)


def test_without_a_relay_all_goes_by_the_transport_and_why_is_said_once(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distnadam")
    far.why = LaneError("no relay could be started on node 1234: it has no memory")
    worker = far.optimizer.worker(0)
    for round in (1, 2):
        stepped = worker.step(gradient(round))
    assert is_right(stepped, 1, 2)
    worker.session.channel.reconnect(far.optimizer.shards.ranges, worker.session.incarnation)
    assert caplog.text.count("no relay could be started on node 1234") == 1
    assert "Ray objects are used instead" in caplog.text
    assert "shards [0, 1] by Ray objects" in caplog.text


def test_a_worker_that_begins_while_the_shards_are_replaced_shares_memory_later(far: Far) -> None:
    far.why = LaneError("shard 0: its process or node died")
    worker = far.optimizer.worker(0)
    worker.step(gradient(1))
    far.why = None
    far.reshard(1)
    assert is_right(worker.step(gradient(2)), 1, 2)
    assert worker.session.channel.relayed == {0}


def test_a_relay_that_does_not_answer_at_a_reconnect_is_not_told_that_the_worker_died(
    far: Far,
) -> None:
    worker = far.optimizer.worker(0)
    worker.step(gradient(1))
    far.why = LaneError("the relay of this node did not answer in time")
    worker.session.channel.reconnect(far.optimizer.shards.ranges, worker.session.incarnation)
    assert is_right(worker.step(gradient(2)), 1, 2)
    assert far.carried == [] and worker.session.channel.relayed == {0, 1}
    assert [host.send(Describe()).result().dead for host in far.hosts] == [(), ()]
    far.why = None
    far.new_relay()
    assert is_right(worker.step(gradient(3)), 1, 2, 3)


def test_objects_are_used_if_the_options_say_so() -> None:
    far = Far(options=Options(transport="objects"))
    far.transport.open_channel = lambda layout, ranges, rank, incarnation: RayWorkerChannel(
        far.transport,
        ChannelOwner(
            node="here",
            rank=rank,
            sizes=layout.sizes,
            addresses=list,
            relayed=lambda: pytest.fail("nobody asks for a relay"),
        ),
        ranges,
        incarnation,
    )
    assert is_right(far.optimizer.worker(0).step(gradient(1)), 1)
    far.close()
