"""A worker's channel to shards of other nodes: by TCP, and by the transport where that fails; real
shards behind real sockets, all in this process.
"""

import logging
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.worker_channel import ChannelOwner, RayWorkerChannel
from distnadam.errors import LaneError
from distnadam.protocol.messages import Join, Push
from distnadam.tensors.arrays import Flat, cut_flat
from distnadam.transport.tcp_connection import Endpoint
from distnadam.transport.tcp_server import TcpServer
from tests.transport.tcp_shards import HANDSHAKE_BYTES, Proxy

PARAMS = {"w": np.linspace(-1, 1, 100_000, dtype=np.float32)}
ANSWER_S = 60.0


class Far:
    """An optimizer whose shards are on another node, as its workers see it."""

    def __init__(self) -> None:
        self.optimizer = DistNadam(num_shards=2, num_workers=1, backend="local").build(PARAMS)
        self.backend: Any = self.optimizer.shards.backend
        self.ranges = self.optimizer.shards.ranges
        hosts = self.backend.transport.hosts
        self.servers = [
            TcpServer(host.shard.spec, host.deliver, "127.0.0.1", None) for host in hosts
        ]
        self.endpoints: dict[int, Endpoint | LaneError] = {
            index: server.endpoint for index, server in enumerate(self.servers)
        }
        self.asked = 0
        joined = [host.send(Join(rank=0)).result().incarnation for host in hosts]
        self.incarnation = joined[0]

    def where(self, shards: Collection[int]) -> Mapping[int, Endpoint | LaneError]:
        self.asked += 1
        return {shard: self.endpoints[shard] for shard in shards}

    def channel(self) -> RayWorkerChannel:
        owner = ChannelOwner(
            node="here",
            rank=0,
            sizes=self.optimizer.shards.layout.sizes,
            addresses=lambda: [ProcessAddress("there", pid=1), ProcessAddress("there", pid=2)],
            endpoints=self.where,
        )
        return RayWorkerChannel(self.backend.transport, owner, self.ranges, self.incarnation)

    def step(self, channel: RayWorkerChannel, round: int) -> Flat:
        """Step once; return the parameters that came back."""
        channel.gradients["float32"][:] = np.sin(np.arange(100_000) + round)
        messages = {
            index: Push(
                epoch=self.optimizer.shards.describe().epoch,
                rank=0,
                incarnation=self.incarnation,
                round=round,
                gradients=cut_flat(channel.gradients, ranges),
                want_parameters=True,
            )
            for index, ranges in enumerate(self.ranges)
        }
        answers = channel.post(messages).result(ANSWER_S)
        assert {answer.round for answer in answers.values()} == {round}
        parts = [answers[index].parameters["float32"] for index in (0, 1)]
        return {"float32": np.concatenate(parts)}


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    for server in far.servers:
        server.close()
    far.optimizer.close()


def right(num_rounds: int) -> Any:
    with DistNadam(backend="local").build(PARAMS) as optimizer:
        for round in range(1, num_rounds + 1):
            w = np.sin(np.arange(100_000) + round).astype(np.float32)
            optimizer.apply_gradients({"w": w})
        return optimizer.get_params()["w"]


def test_shards_of_another_node_are_reached_by_tcp(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distnadam")
    channel = far.channel()
    for round in (1, 2, 3):
        stepped = far.step(channel, round)
    assert stepped["float32"].tobytes() == right(3).tobytes()
    assert "shards [0, 1] by TCP, shards none by Ray objects" in caplog.text
    assert far.asked == 1
    channel.close()


def test_a_push_whose_line_is_lost_on_its_way_goes_by_the_transport_and_counts_once(
    far: Far,
) -> None:
    whole = far.endpoints[1]
    assert isinstance(whole, Endpoint)
    for after in (5, 3000, 199_000, 210_000, 250_000):
        channel = None
        proxy = Proxy(whole, HANDSHAKE_BYTES + after, "reset")
        far.endpoints[1] = proxy.endpoint
        channel = far.channel()
        begin = far.optimizer.shards.describe().round
        for round in (begin + 1, begin + 2):
            stepped = far.step(channel, round)
        assert proxy.passed == HANDSHAKE_BYTES + after
        assert stepped["float32"].tobytes() == right(begin + 2).tobytes()
        channel.close()


def test_a_port_that_cannot_be_reached_is_named_once_and_tried_less_and_less_often(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    good = far.endpoints[1]
    assert isinstance(good, Endpoint)
    far.endpoints[1] = replace(good, port=port)
    far.endpoints[0] = LaneError("shard 0 cannot listen at 10.0.0.1: any port is not to be had")
    channel = far.channel()
    for tries in range(1, 4):
        assert far.step(channel, tries)["float32"].tobytes() == right(tries).tobytes()
        assert far.asked == tries
        wait_s = channel._reopen_at - time.monotonic()
        assert 10 * 2**tries - 5 < wait_s <= 10 * 2**tries
        channel._reopen_at = 0.0
    assert caplog.text.count("shard 0 cannot listen at 10.0.0.1") == 1
    assert caplog.text.count(f"shard 1 cannot be reached at 127.0.0.1 port {port}: ") == 1
    assert caplog.text.count("Ray objects are used instead") == 1
    assert "Options(port_range=...)" in caplog.text
    far.endpoints[1] = good
    far.step(channel, 4)
    far.endpoints[0] = far.servers[0].endpoint
    channel._reopen_at = 0.0
    assert far.step(channel, 5)["float32"].tobytes() == right(5).tobytes()
    assert 0 in channel._tcp and 1 in channel._tcp
    channel.close()
