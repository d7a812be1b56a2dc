"""Shards of another host as their processes have them, and workers and lines that reach them."""

import select
import socket
import ssl
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np

from distnadam.config import NadamConfig, Options
from distnadam.protocol.messages import Describe, Join, Push, ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import Dtypes, Flat, cut_flat
from distnadam.tensors.layout import Layout
from distnadam.transport.tcp_client import TcpClient
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

    def __init__(self, index: int, config: NadamConfig) -> None:
        self.spec = ShardSpec(
            index=index,
            num_shards=2,
            num_workers=2,
            replicas=0,
            name=None,
            config=config,
            options=Options(),
            layout=LAYOUT.pulled_in(config.pull_dtype),
            ranges=CUTS[index],
        )
        self.host = ShardHost(self.spec)
        self.server = TcpServer(self.spec, self.host.deliver, "127.0.0.1", None)
        self.host.send(Load(epoch=EPOCH, params=cut_flat(PARAMS, self.spec.ranges))).result()

    @property
    def endpoint(self) -> Endpoint:
        return self.server.endpoint

    def close(self) -> None:
        self.server.close()
        self.host.close()


class Shards:
    def __init__(self, config: NadamConfig | None = None) -> None:
        self.all = [Shard(index, config or NadamConfig()) for index in range(2)]

    def join(self, rank: int) -> int:
        incarnation: int = self.all[0].host.send(Join(rank=rank)).result().incarnation
        self.all[1].host.send(Join(rank=rank, incarnation=incarnation)).result()
        return incarnation

    def worker(self, rank: int) -> "Worker":
        dtypes = self.all[0].spec.layout.pull_dtypes
        worker = Worker(rank, self.join(rank), dtypes)
        for shard in self.all:
            worker.client.open(shard.spec.index, shard.endpoint, shard.spec.ranges)
        return worker

    def round(self, index: int) -> int:
        found: int = self.all[index].host.send(Describe()).result().round
        return found

    def close(self) -> None:
        for shard in self.all:
            shard.close()


class Worker:
    def __init__(self, rank: int, incarnation: int, dtypes: Dtypes | None = None) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.client = TcpClient(rank, incarnation, dtypes)

    def pushes(self, round: int, gradients: Flat) -> dict[int, Push]:
        return {
            index: Push(
                epoch=EPOCH,
                rank=self.rank,
                incarnation=self.incarnation,
                round=round,
                gradients=cut_flat(gradients, ranges),
                want_parameters=True,
            )
            for index, ranges in enumerate(CUTS)
        }

    def push(self, round: int, gradients: Flat) -> int:
        return self.client.post(self.pushes(round, gradients))

    def collect(self, number: int, timeout_s: float = ANSWER_S) -> dict[int, Any]:
        return self.client.collect(number, {0: None, 1: None}, time.monotonic() + timeout_s)


def gradients(step: int, rank: int, dtype: Any = "float32") -> Flat:
    rng = np.random.default_rng([step, rank])
    narrow = rng.standard_normal(PARAMS["float32"].size).astype(dtype)
    return {"float32": narrow, "float64": rng.standard_normal(PARAMS["float64"].size)}


def same(one: Flat, other: Flat) -> bool:
    return all(one[space].tobytes() == other[space].tobytes() for space in other)


class Proxy:
    """Passes bytes between a worker and a shard, until so many have gone to the shard."""

    def __init__(self, endpoint: Endpoint, most: int, how: str) -> None:
        self._to, self._most, self._how = (endpoint.host, endpoint.port), most, how
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = replace(endpoint, port=self._listener.getsockname()[1])
        self.passed = 0
        self.release = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        worker, _ = self._listener.accept()
        self._listener.close()
        shard = socket.create_connection(self._to)
        while True:
            for sock in select.select([worker, shard], [], [])[0]:
                data = sock.recv(
                    min(1 << 16, self._most - self.passed) if sock is worker else 1 << 16
                )
                if not data:
                    worker.close()
                    shard.close()
                    return
                (shard if sock is worker else worker).sendall(data)
                self.passed += len(data) if sock is worker else 0
            if self.passed >= self._most:
                if self._how == "reset":
                    for sock in (worker, shard):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        sock.close()
                else:
                    self.release.wait(ANSWER_S)
                    worker.close()
                    shard.close()
                return


HANDSHAKE_BYTES = 135
"""More than a worker sends before its first push."""


def is_hung_up_on(sock: socket.socket) -> bool:
    """Whether nothing comes any more."""
    try:
        return sock.recv(4096) == b""
    except (ConnectionResetError, ssl.SSLError):
        return True
