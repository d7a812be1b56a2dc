"""Two hosts in one process: shards that listen on one, workers and their relay on the other; real
memory and sockets, the carrier of last resort by calls.
"""

import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.delivery import Reply
from distnadam.protocol.messages import Describe, Description, Join, Pull, Push, ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import Dtypes, Flat, cut_flat
from distnadam.tensors.layout import Layout
from distnadam.transport.far_shard import Reach
from distnadam.transport.relay import Relay
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_channel import ShmClient
from distnadam.transport.tcp_connection import Endpoint
from distnadam.transport.tcp_server import TcpServer

PARAMS: Flat = {
    "float32": np.linspace(-1, 1, 300_000, dtype=np.float32),
    "float64": np.linspace(3, 4, 5000),
}
LAYOUT = Layout.of({"w": PARAMS["float32"], "z": PARAMS["float64"]})
CUTS = LAYOUT.cuts(2)
ANSWER_S = 60.0
EPOCH = 1


class Shard:
    """One shard of another host, as its process has it."""

    def __init__(self, index: int, config: NadamConfig, num_workers: int) -> None:
        self.spec = ShardSpec(
            index=index,
            num_shards=2,
            num_workers=num_workers,
            replicas=0,
            name=None,
            config=config,
            options=Options(),
            layout=LAYOUT.for_workers(config.pull_dtype, may_lack=config.clocks == "tensor"),
            ranges=CUTS[index],
        )
        self.host = ShardHost(self.spec)
        self.server = TcpServer(self.spec, self.host.deliver, "127.0.0.1", None)
        self.host.send(Load(epoch=EPOCH, params=cut_flat(PARAMS, self.spec.ranges))).result()

    @property
    def endpoint(self) -> Endpoint:
        return self.server.endpoint

    def describe(self) -> Description:
        found: Description = self.host.send(Describe()).result()
        return found

    def close(self) -> None:
        self.server.close()
        self.host.close()


class Shards:
    def __init__(self, config: NadamConfig | None = None, num_workers: int = 2) -> None:
        self.all = [Shard(index, config or NadamConfig(), num_workers) for index in range(2)]

    def join(self, rank: int) -> int:
        incarnation: int = self.all[0].host.send(Join(rank=rank)).result().incarnation
        self.all[1].host.send(Join(rank=rank, incarnation=incarnation)).result()
        return incarnation

    def close(self) -> None:
        for shard in self.all:
            shard.close()


class Host:
    """A host with workers and no shard: its relay, which reaches the shards at these endpoints."""

    def __init__(self, shards: Shards, endpoints: Mapping[int, Endpoint] | None = None) -> None:
        self.shards = shards
        self.endpoints = {i: s.endpoint for i, s in enumerate(shards.all)} | dict(endpoints or {})
        self.carried: list[tuple[int, Any]] = []
        self.dtypes = shards.all[0].spec.layout.pull_dtypes
        self.arena = Arena.create(LAYOUT.sizes, copies=2, dtypes=self.dtypes)
        self.relay = Relay(2, self.arena)
        for index, shard in enumerate(shards.all):
            self.relay.serve(shard.spec, self._reach(index))
        self.relay.await_connections((0, 1), ANSWER_S)

    def _reach(self, index: int) -> Reach:
        def carry(message: Any, reply: Reply) -> None:
            self.carried.append((index, message))
            self.shards.all[index].host.deliver(message, reply)

        return Reach(find=lambda: self.endpoints[index], carry=carry)

    def worker(self, rank: int, incarnation: int | None = None) -> "Worker":
        if incarnation is None:
            incarnation = self.shards.join(rank)
        worker = Worker(rank, incarnation, self.dtypes)
        for index in (0, 1):
            worker.client.open(index, self.relay.address(index))
        return worker

    def close(self) -> None:
        self.relay.close()


class Worker:
    def __init__(self, rank: int, incarnation: int, dtypes: Dtypes | None = None) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.client = ShmClient(LAYOUT.sizes, CUTS, rank, incarnation, dtypes)

    def pushes(self, round: int, gradients: Flat) -> dict[int, Push]:
        """Write the gradients where the relay reads them, in their own dtypes."""
        dtypes = {space: array.dtype for space, array in gradients.items()}
        memory = self.client._arena.flat(dtypes=dtypes)
        for space, array in gradients.items():
            memory[space][:] = array
        return {
            index: Push(
                epoch=EPOCH,
                rank=self.rank,
                incarnation=self.incarnation,
                round=round,
                gradients=cut_flat(memory, ranges),
            )
            for index, ranges in enumerate(CUTS)
        }

    def push(self, round: int, gradients: Flat) -> int:
        return self.client.post(self.pushes(round, gradients))

    def collect(self, number: int, timeout_s: float = ANSWER_S) -> dict[int, Any]:
        return self.client.collect(number, 2, time.monotonic() + timeout_s)

    def pull(self, at_least: int = 0) -> dict[int, Any]:
        message = Pull(rank=self.rank, incarnation=self.incarnation, at_least=at_least, epoch=EPOCH)
        return self.collect(self.client.post({0: message, 1: message}))

    def parameters(self, answers: Mapping[int, Any]) -> Flat:
        """Return what the worker reads, once all shards have answered."""
        (buffer,) = {answer.buffer for answer in answers.values()}
        assert all(answer.parameters is None for answer in answers.values())
        return self.client.parameters[buffer]


def gradients(step: int, rank: int, dtype: Any = "float32") -> Flat:
    rng = np.random.default_rng([step, rank])
    narrow = rng.standard_normal(PARAMS["float32"].size).astype(dtype)
    return {"float32": narrow, "float64": rng.standard_normal(PARAMS["float64"].size)}


def stepped_here(num_rounds: int, dtype: Any = "float32", **how: Any) -> Flat:
    """Return the parameters after the same pushes of both ranks by calls."""
    shards = Shards(NadamConfig(**how))
    incarnations = [shards.join(0), shards.join(1)]
    whole = {space: array.copy() for space, array in PARAMS.items()}
    for shard in shards.all:
        for step in range(num_rounds):
            futures = [
                shard.host.send(
                    Push(
                        epoch=EPOCH,
                        rank=rank,
                        incarnation=incarnations[rank],
                        round=step + 1,
                        gradients=cut_flat(gradients(step, rank, dtype), shard.spec.ranges),
                        want_parameters=True,
                    )
                )
                for rank in (0, 1)
            ]
            answers = [future.result(ANSWER_S) for future in futures]
        for space, array in cut_flat(whole, shard.spec.ranges).items():
            array[:] = answers[0].parameters[space]
    shards.close()
    return whole


def same(one: Flat, other: Flat) -> bool:
    return all(one[space].tobytes() == other[space].tobytes() for space in other)


class Proxy:
    """Passes bytes between a relay and a shard, until so many have gone to the shard.

    Args:
        endpoint: the shard's.
        most: bytes towards the shard, or from it where `back`, before it does what `how` says.
        how: "reset" or "halt".
        back: whether the bytes from the shard count.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        most: float = float("inf"),
        how: str = "reset",
        *,
        back: bool = False,
    ) -> None:
        self._to, self._most, self._how = (endpoint.host, endpoint.port), most, how
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = replace(endpoint, port=self._listener.getsockname()[1])
        self._counted = "back" if back else "there"
        self.passed = {"there": 0, "back": 0}
        self.release = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        relay, _ = self._listener.accept()
        self._listener.close()
        shard = socket.create_connection(self._to)
        ways = {relay: (shard, "there"), shard: (relay, "back")}
        while True:
            for sock in select.select([relay, shard], [], [])[0]:
                other, way = ways[sock]
                left = self._most - self.passed[way] if way == self._counted else 1 << 16
                try:
                    data = sock.recv(int(min(1 << 16, left)))
                except ConnectionResetError:
                    data = b""
                if not data:
                    relay.close()
                    shard.close()
                    return
                self.passed[way] += len(data)  # before what they cause can be seen
                other.sendall(data)
                if self.passed[self._counted] >= self._most:
                    self._end(relay, shard)
                    return

    def _end(self, relay: socket.socket, shard: socket.socket) -> None:
        if self._how == "reset":
            for sock in (relay, shard):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
        else:
            self.release.wait(ANSWER_S)
            relay.close()
            shard.close()


HANDSHAKE_BYTES = 135
"""More than a relay sends before its first message."""


def is_hung_up_on(sock: socket.socket) -> bool:
    """Whether nothing comes any more."""
    try:
        return sock.recv(4096) == b""
    except (ConnectionResetError, ssl.SSLError):
        return True
