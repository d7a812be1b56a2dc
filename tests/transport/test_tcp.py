"""TCP between a worker and shards of other hosts: real shards behind real sockets, all in here."""

import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest

from distnadam.config import NadamConfig, Options
from distnadam.errors import LaneError, StaleEpoch, SupersededWorker
from distnadam.protocol.codec import HEADER, pack
from distnadam.protocol.messages import Describe, Join, Push, RoundResult, ShardSpec, TotalNorms
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import Flat, cut_flat
from distnadam.tensors.layout import Layout, sizes_of
from distnadam.transport.tcp_client import TcpClient
from distnadam.transport.tcp_connection import Endpoint, LoopThread, TcpConnection, greeting
from distnadam.transport.tcp_server import TcpServer
from tests.certificates import certificates

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
            layout=LAYOUT,
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
        worker = Worker(rank, self.join(rank))
        for shard in self.all:
            worker.client.open(shard.spec.index, shard.endpoint, shard.spec.ranges)
        return worker

    def round(self, index: int) -> int:
        found: int = self.all[index].host.send(Describe()).result().round
        return found


class Worker:
    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.client = TcpClient(rank, incarnation)

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


@pytest.fixture
def shards() -> Iterator[Shards]:
    shards = Shards()
    yield shards
    for shard in shards.all:
        shard.close()


def gradients(step: int, rank: int, dtype: Any = "float32") -> Flat:
    rng = np.random.default_rng([step, rank])
    narrow = rng.standard_normal(PARAMS["float32"].size).astype(dtype)
    return {"float32": narrow, "float64": rng.standard_normal(PARAMS["float64"].size)}


def stepped_here(num_rounds: int, dtype: Any = "float32", **how: Any) -> list[Flat]:
    """Return each shard's parameters after the same pushes by calls."""
    ends = []
    shards = Shards(NadamConfig(**how))
    incarnations = [shards.join(0), shards.join(1)]
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
        ends.append({space: array.copy() for space, array in answers[0].parameters.items()})
        shard.close()
    return ends


def same(one: Flat, other: Flat) -> bool:
    return all(one[space].tobytes() == other[space].tobytes() for space in other)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_pushes_over_tcp_give_the_bits_of_calls_to_every_worker(dtype: Any, shards: Shards) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    for step in range(3):
        numbers = [worker.push(step + 1, gradients(step, worker.rank, dtype)) for worker in workers]
        answers = [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]
    right = stepped_here(3, dtype)
    for each in answers:
        for index in (0, 1):
            assert (each[index].round, each[index].outcome) == (3, "applied")
            assert same(each[index].parameters, right[index])


def test_with_rays_certificates_all_goes_by_tls_and_both_ends_ask_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in certificates(tmp_path).items():
        monkeypatch.setenv(name, value)
    shards = Shards()
    workers = [shards.worker(0), shards.worker(1)]
    for step in range(3):
        numbers = [worker.push(step + 1, gradients(step, worker.rank)) for worker in workers]
        answers = [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]
    assert all(
        same(each[index].parameters, stepped_here(3)[index]) for each in answers for index in (0, 1)
    )
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with socket.create_connection(place, ANSWER_S) as stranger:
        stranger.sendall(bytes(500))
        assert stranger.recv(4096)[:1] in (b"", b"\x15"), "an alert of TLS, and no nonce"
    without = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    stranger = socket.create_connection(place, ANSWER_S)
    with without.wrap_socket(stranger, server_hostname="127.0.0.1") as secure:
        assert stranger_is_hung_up_on(secure), "no nonce for whom has no certificate"
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(tmp_path / "other"))
    with pytest.raises(LaneError, match="RAY_USE_TLS is on, and its certificates cannot be used"):
        Worker(1, 1).client.open(0, shards.all[0].endpoint, CUTS[0])
    for shard in shards.all:
        shard.close()


def test_clipping_by_norm_takes_two_phases_over_tcp() -> None:
    shards = Shards(NadamConfig(global_clipnorm=0.5))
    workers = [shards.worker(0), shards.worker(1)]
    numbers = [worker.push(1, gradients(0, worker.rank)) for worker in workers]
    for worker, number in zip(workers, numbers, strict=True):
        measured = worker.collect(number)
        assert {type(answer).__name__ for answer in measured.values()} == {"PartialNorms"}
    sums = [sum(float(a.sum()) for _, a in measured[index].sums) for index in (0, 1)]
    norms = {
        worker.rank: TotalNorms(
            epoch=EPOCH,
            rank=worker.rank,
            incarnation=worker.incarnation,
            round=1,
            square_sums=np.array([sums[0], sums[1]]),
            want_parameters=True,
        )
        for worker in workers
    }
    numbers = [worker.client.post(dict.fromkeys((0, 1), norms[worker.rank])) for worker in workers]
    for worker, number in zip(workers, numbers, strict=True):
        for index, answer in worker.collect(number).items():
            assert answer.outcome == "applied"
            assert answer.parameters["float64"].shape == (sizes_of(CUTS[index])["float64"],)
    for shard in shards.all:
        shard.close()


def test_a_refusal_is_raised_and_the_connection_goes_on(shards: Shards) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    stale = {i: replace(p, epoch=0) for i, p in workers[0].pushes(1, gradients(0, 0)).items()}
    with pytest.raises(StaleEpoch):
        workers[0].collect(workers[0].client.post(stale))
    numbers = [worker.push(1, gradients(0, worker.rank)) for worker in workers]
    assert {a.round for a in workers[0].collect(numbers[0]).values()} == {1}
    shards.join(0)
    with pytest.raises(SupersededWorker):
        workers[0].collect(workers[0].push(2, gradients(1, 0)))


def test_what_a_round_waits_for_times_out_and_can_be_awaited_again(shards: Shards) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    number = workers[0].push(1, gradients(0, 0))
    with pytest.raises(TimeoutError):
        workers[0].collect(number, 0.05)
    workers[1].push(1, gradients(0, 1))
    assert {a.round for a in workers[0].collect(number).values()} == {1}


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


@pytest.mark.parametrize("after", [0, 1, 11, 12, 40, 4000, 599_000])
def test_a_connection_that_is_reset_at_any_byte_is_lost_and_its_push_not_counted(
    after: int, shards: Shards
) -> None:
    worker, other = Worker(0, shards.join(0)), shards.worker(1)
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + after, "reset")
    worker.client.open(0, proxy.endpoint, CUTS[0])
    worker.client.open(1, shards.all[1].endpoint, CUTS[1])
    begun = other.push(1, gradients(0, 1))
    answers = worker.collect(worker.push(1, gradients(0, 0)))
    assert answers[0] is None and 0 not in worker.client
    assert answers[1].round == 1
    assert shards.round(0) == 0, "half a push counts as none"
    message = worker.pushes(1, gradients(0, 0))[0]
    assert shards.all[0].host.send(message).result(ANSWER_S).round == 1  # as the fallback sends it
    assert {a.round for a in other.collect(begun).values()} == {1}


def test_a_push_that_is_still_being_sent_is_given_up_before_its_memory_changes() -> None:
    shards = Shards()
    worker = Worker(0, shards.join(0))
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + 20, "halt")
    worker.client.open(0, proxy.endpoint, CUTS[0])
    big = np.zeros(1 << 24, np.float32)  # more than all buffers on the way
    message = replace(worker.pushes(1, gradients(0, 0))[0], gradients={"float32": big})
    number = worker.client.post({0: message})
    with pytest.raises(TimeoutError):
        worker.client.collect(number, {0: None}, time.monotonic() + 0.2)
    assert 0 in worker.client
    worker.client.post(worker.pushes(1, gradients(0, 0)))
    assert 0 not in worker.client
    proxy.release.set()
    for shard in shards.all:
        shard.close()


def test_who_does_not_know_the_secret_is_refused_on_either_side(shards: Shards) -> None:
    worker = Worker(0, shards.join(0))
    wrong = replace(shards.all[0].endpoint, secret=b"x" * 32)
    with pytest.raises(LaneError, match=r"shard 0 cannot be reached at 127.0.0.1 port \d+: "):
        worker.client.open(0, wrong, CUTS[0])
    assert 0 not in worker.client
    # a listener that only repeats what it hears
    with socket.create_server(("127.0.0.1", 0)) as echo:

        def answer() -> None:
            sock, _ = echo.accept()
            with sock:
                sock.sendall(framed({"nonce": b"n" * 32}))
                sock.sendall(sock.recv(4096))
                sock.recv(1)

        threading.Thread(target=answer, daemon=True).start()
        fake = replace(shards.all[0].endpoint, port=echo.getsockname()[1])
        with pytest.raises(LaneError, match="the peer does not know the secret"):
            worker.client.open(0, fake, CUTS[0])


def framed(content: Any) -> bytes:
    body: bytes = msgpack.packb(content)
    return len(body).to_bytes(4, "little") + bytes(8) + body


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(5000),
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "half a head": b"\x10",
    "a huge head": b"\xff" * 12,
    "arrays before the proof": (4).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little"),
    "another content": framed([1, 2]),
    "no proof": framed({"nonce": b"n" * 32, "greeting": msgpack.packb({}), "proof": b""}),
    "another type": framed({"nonce": 1, "greeting": 2, "proof": 3}),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a_stranger_is_hung_up_on_and_the_others_are_served_on(
    garbage: bytes, shards: Shards
) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with socket.create_connection(place, ANSWER_S) as stranger:
        assert len(stranger.recv(4096)) > 32  # its nonce
        stranger.sendall(garbage)
        if garbage in (b"", GARBAGE["half a head"]):
            stranger.shutdown(socket.SHUT_WR)
        assert stranger_is_hung_up_on(stranger)
    numbers = [worker.push(1, gradients(0, worker.rank)) for worker in workers]
    assert {a.round for a in workers[0].collect(numbers[0]).values()} == {1}


def stranger_is_hung_up_on(sock: socket.socket) -> bool:
    try:
        return sock.recv(4096) == b""
    except (ConnectionResetError, ssl.SSLError):
        return True


def test_a_flood_of_strangers_costs_a_bounded_number_of_connections(shards: Shards) -> None:
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(place, ANSWER_S)) for _ in range(200)
        ]
        worker = Worker(0, shards.join(0))
        worker.client.open(0, shards.all[0].endpoint, CUTS[0])
        assert 0 in worker.client
        assert 0 < sum(map(is_open, strangers)) <= 64


def is_open(sock: socket.socket) -> bool:
    """Whether nothing comes after the nonce, not even an end."""
    try:
        if not sock.recv(4096):
            return False
        sock.setblocking(False)
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


BAD_MESSAGES = {
    "no message": lambda w: b"\xc1",
    "another's": lambda w: pack(1, replace(w.pushes(1, gradients(0, 0))[0], rank=1))[HEADER.size :],
    "an answer": lambda w: pack(1, result())[HEADER.size :],
}


def result() -> RoundResult:
    return RoundResult(
        epoch=1,
        round=1,
        iterations=1,
        outcome="applied",
        rejection=None,
        lr=0.1,
        buffer=0,
    )


@pytest.mark.parametrize("message", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
@pytest.mark.parametrize("num_bytes", [0, 7])
def test_a_worker_that_sends_what_is_no_message_of_its_own_is_hung_up_on(
    message: Any, num_bytes: int, shards: Shards
) -> None:
    worker = shards.worker(0)
    body = message(worker)
    line = worker.client._lines[0]
    line.send(body, [memoryview(bytes(num_bytes))] if num_bytes else [])
    deadline = time.monotonic() + ANSWER_S
    while 0 in worker.client:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert shards.round(0) == 0


class Sink:
    """A receiver that takes any message of up to 100 bytes of arrays."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def proven(self, connection: TcpConnection, greeting: Any) -> None:
        self.seen.append("proven")

    def landing(self, connection: TcpConnection, message: bytes, num_bytes: int) -> Any:
        if num_bytes > 100:
            raise LaneError("too long")
        land = bytearray(num_bytes)
        return (message, land), [memoryview(land)] if num_bytes else []

    def arrived(self, connection: TcpConnection, what: Any) -> None:
        self.seen.append(what)

    def ended(self, connection: TcpConnection, why: str) -> None:
        self.seen.append(why)


class Wire:
    """What a connection does with its transport, and nothing more."""

    def __init__(self) -> None:
        self.sent = b""
        self.aborted = False

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        assert (high, low) == (1, 0)

    def get_extra_info(self, name: str) -> Any:
        return self

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert value > 0

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def abort(self) -> None:
        self.aborted = True


def fed(connection: TcpConnection, data: bytes, rng: random.Random) -> None:
    """Give a connection bytes in pieces of any size."""
    while data:
        room = connection.get_buffer(-1)
        assert len(room) > 0
        count = min(len(room), len(data), rng.choice([1, 2, 11, 12, 13, 100, 70_000]))
        room[:count] = data[:count]
        connection.buffer_updated(count)
        data = data[count:]


def pair() -> tuple[TcpConnection, TcpConnection, Wire, Wire]:
    wires = Wire(), Wire()
    shard = TcpConnection(Sink(), b"s" * 32)
    worker = TcpConnection(Sink(), b"s" * 32, greeting(0, 1))
    shard.connection_made(wires[0])  # type: ignore[arg-type]
    worker.connection_made(wires[1])  # type: ignore[arg-type]
    return shard, worker, *wires


def test_frames_cut_anywhere_come_whole_and_in_order() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        shard, worker, to_worker, to_shard = pair()
        fed(worker, to_worker.sent, rng)
        fed(shard, to_shard.sent, rng)
        assert shard.is_proven
        to_shard.sent = b""
        messages = [
            (rng.randbytes(rng.choice([0, 1, 50, 70_000])), rng.randbytes(rng.choice([0, 1, 99])))
            for _ in range(5)
        ]
        for message, behind in messages:
            worker.send(message, [memoryview(behind)])
        fed(shard, to_shard.sent, rng)
        seen: Any = shard._receiver.seen[1:]  # type: ignore[attr-defined]
        assert [(m, bytes(b)) for m, b in seen] == messages


@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1500)
def test_no_bytes_whatever_do_more_than_hang_up(count: int) -> None:
    """Handshakes and frames with flipped, cut, repeated and random bytes."""
    rng = random.Random(7)
    _, worker, to_worker, to_shard = pair()
    fed(worker, to_worker.sent, rng)
    good = to_shard.sent
    for _ in range(count):
        shard = TcpConnection(Sink(), b"s" * 32)
        wire = Wire()
        shard.connection_made(wire)  # type: ignore[arg-type]
        if rng.random() < 0.5:  # a worker that went wrong after its proof
            peer, there = TcpConnection(Sink(), b"s" * 32, greeting(0, 1)), Wire()
            peer.connection_made(there)  # type: ignore[arg-type]
            fed(peer, wire.sent, rng)
            fed(shard, there.sent, rng)
            assert shard.is_proven
            data = spoiled(framed({"push": 1}), rng)
        else:
            data = spoiled(good, rng)
        before = shard.is_proven
        try:
            while data and not wire.aborted:
                room = shard.get_buffer(-1)
                taken = min(len(room), len(data))
                room[:taken] = data[:taken]
                shard.buffer_updated(taken)
                data = data[taken:]
        finally:
            assert shard.is_proven == before, "only a proof proves"


def spoiled(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        match rng.randrange(4):
            case 0 if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1:
                del changed[rng.randrange(len(changed) + 1) :]
            case 2:
                changed += bytes(changed)
            case _:
                changed += rng.randbytes(rng.randrange(60))
    return bytes(changed)


def test_two_servers_do_not_take_one_port_and_a_range_is_kept() -> None:
    shards = Shards()
    spec = shards.all[0].spec
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with pytest.raises(LaneError, match=f"shard 0 cannot listen at 127.0.0.1: a port from {port}"):
        TcpServer(spec, lambda message, reply, run: None, "127.0.0.1", (port, port))
    taken.close()
    server = TcpServer(spec, lambda message, reply, run: None, "127.0.0.1", (port, port))
    assert server.endpoint.port == port
    server.close()
    for shard in shards.all:
        shard.close()


def test_a_loop_that_is_gone_takes_no_calls() -> None:
    thread = LoopThread()
    thread.close()
    thread.call(print)
