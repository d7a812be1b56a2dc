"""A standby on another host, fed by TCP: what becomes of a line that is cut at any byte, halted, or
spoken on by others. Real sockets and real standbys, all in this process but where one is killed.
"""

import multiprocessing
import os
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from distnadam.config import Options
from distnadam.errors import LaneError
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.protocol.codec import pack_record
from distnadam.protocol.frames import HEADER
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Reconfigure,
    Record,
    ReplicatedJoin,
    ReplicatedRound,
    ShardControlState,
)
from distnadam.runtime.shard_host import ShardHost
from distnadam.runtime.standby import Standby
from distnadam.tensors.arrays import STATE_ARRAYS, Flat
from distnadam.tensors.layout import Layout, sizes_of
from distnadam.transport.tcp_connection import (
    Endpoint,
    Parts,
    TcpConnection,
    greeting,
    primary_greeting,
)
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.tcp_listener import TcpListener
from distnadam.transport.tcp_replication import (
    PIECE_BYTES,
    TcpReplicationStream,
    TcpStandbyReceiver,
)
from tests.certificates import certificates
from tests.transport.tcp_shards import Proxy

PATIENCE_S = 30.0
ROUNDS = 3
CONFIG = NadamConfig()


def spec_of(size: int) -> ShardSpec:
    layout = Layout.of({"w": np.ones(size, np.float32), "z": np.ones(5)})
    return ShardSpec(
        index=0,
        num_shards=1,
        num_workers=1,
        replicas=1,
        name=None,
        config=CONFIG,
        options=Options(kernel="numpy"),
        layout=layout,
        ranges=layout.cuts(1)[0],
    )


def arrays_of(spec: ShardSpec, seed: int) -> dict[str, Flat]:
    rng = np.random.default_rng(seed)
    sizes = sizes_of(spec.ranges)
    return {
        name: {space: np.abs(rng.standard_normal(n)).astype(space) for space, n in sizes.items()}
        for name in STATE_ARRAYS
    }


def control_state(number: int) -> ShardControlState:
    return ShardControlState(
        epoch=1,
        round=number,
        skipped=0,
        clock=Clock(),
        lr=0.0,
        active=0,
        outcome="applied",
        rejection=None,
        ledger={"runs": [], "newest": []},
    )


def rounds(first: int, count: int) -> Iterator[ReplicatedRound]:
    """Yield applied rounds as a primary decides them from a new clock on."""
    clock = Clock()
    for number in range(first, first + count):
        scalars = step_scalars(clock, CONFIG)
        clock = scalars.after
        yield ReplicatedRound(
            round=number,
            skipped=0,
            outcome="applied",
            rejection=None,
            counted={},
            lr=scalars.lr,
            active=number % 2,
            clock=clock,
        )


class Far:
    """A standby of another host and what it applied, with the mean that lay in its memory then."""

    def __init__(self, size: int = 60) -> None:
        self.spec = spec_of(size)
        self.standby = Standby(self.spec)
        self.came: list[tuple[Record, float]] = []
        self.hang = threading.Event()
        self.hang.set()
        self.decided = 0
        sizes = sizes_of(self.spec.ranges)
        self.receiver = TcpStandbyReceiver(
            0, sizes, STATE_ARRAYS, self._begin, self._apply, "127.0.0.1", None
        )
        self.arrays = arrays_of(self.spec, 1)

    def _begin(self, arrays: dict[str, Flat]) -> None:
        self.standby.take_arrays(arrays)
        self.standby.begin(control_state(self.decided), CONFIG)

    def _apply(self, record: Record, mean: Flat) -> None:
        self.hang.wait(PATIENCE_S)
        self.standby.apply(record, mean)
        self.came.append((record, float(mean["float64"][-1]) if mean else 0.0))

    def connect(
        self, endpoint: Endpoint | None = None, timeout_s: float = PATIENCE_S
    ) -> TcpReplicationStream:
        """Fill it, over a proxy perhaps."""
        return TcpReplicationStream(
            0, endpoint or self.receiver.endpoint, self.arrays, self.decided, timeout_s
        )

    def promoted(self) -> tuple[int, dict[str, Flat]]:
        """Make it the primary, as a supervisor does; return its round and arrays."""
        self.receiver.close()
        reconfigure = Reconfigure(epoch=2, schedule=(), newest={})
        host, state = self.standby.promote(reconfigure, ShardHost)
        return state.round, host.shard.state.arrays()

    def close(self) -> None:
        self.hang.set()
        self.receiver.close()


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.close()


def write_mean(stream: TcpReplicationStream, number: int) -> None:
    for values in stream.mean.values():
        values[:] = np.linspace(-number, number, values.size)


def bits(arrays: dict[str, Flat]) -> dict[str, bytes]:
    return {
        f"{name}/{space}": values.tobytes()
        for name, flat in arrays.items()
        for space, values in flat.items()
    }


def expected_bits(far: Far) -> list[dict[str, bytes]]:
    """Return the bits after each round, stepped here without any stream."""
    here = Standby(far.spec)
    here.take_arrays(
        {name: {s: v.copy() for s, v in flat.items()} for name, flat in far.arrays.items()}
    )
    here.begin(control_state(0), CONFIG)
    found = [bits(here.arrays)]
    for record in rounds(1, ROUNDS):
        mean = {
            space: np.linspace(-record.round, record.round, n).astype(space)
            for space, n in sizes_of(far.spec.ranges).items()
        }
        here.apply(record, mean)
        found.append(bits(here.arrays))
    return found


def bytes_of_a_run() -> int:
    """Return how many bytes a primary sends for its state, all rounds, and perhaps its end."""
    far = Far()
    proxy = Proxy(far.receiver.endpoint, 1 << 30, "reset")
    stream = far.connect(proxy.endpoint)
    for record in rounds(1, ROUNDS):
        write_mean(stream, record.round)
        assert stream.send(record)
    stream.close()
    far.close()
    return proxy.passed["there"]


def cut_at(byte: int) -> tuple[int | None, int | None]:
    """Cut the line behind so many bytes, promote the standby and compare its bits.

    Return the round that the primary counts as delivered, and the promoted standby's.
    """
    far = Far()
    proxy = Proxy(far.receiver.endpoint, byte, "reset")
    stream = None
    with suppress(LaneError):
        stream = far.connect(proxy.endpoint)
    if stream is None:
        far.receiver.close()
        assert far.standby.reached is None, "a state that came half can take over"
        return None, None
    for record in rounds(1, ROUNDS):
        if not stream.ready():
            break
        write_mean(stream, record.round)
        if not stream.send(record):
            break
    reached, arrays = far.promoted()
    assert bits(arrays) == expected_bits(far)[reached]
    assert [record.round for record, _ in far.came if isinstance(record, ReplicatedRound)] == [
        *range(1, reached + 1)
    ]
    assert stream.reached <= reached <= stream.reached + 1, "delivered, or whole and not yet known"
    stream.close()
    return stream.reached, reached


def test_a_standby_whose_line_is_cut_at_any_byte_takes_over_with_what_was_delivered() -> None:
    total = bytes_of_a_run()
    found = [cut_at(byte) for byte in range(1, total + 1, total // 40)]
    assert {delivered for delivered, _ in found} >= {None, 0, 1, 2}, "every round was cut"


@pytest.mark.nightly
def test_each_byte_at_which_a_line_is_cut_leaves_what_was_delivered() -> None:
    for byte in range(1, bytes_of_a_run() + 1):
        cut_at(byte)


def killed_primary(endpoint: Endpoint, half: bool) -> None:
    """Be a primary that is killed after two rounds, or in the middle of sending the third."""
    arrays = arrays_of(spec_of(60), 1)
    stream = TcpReplicationStream(0, endpoint, arrays, 0, 2.0 if half else PATIENCE_S)
    for record in rounds(1, 2 + half):
        write_mean(stream, record.round)
        assert stream.send(record) == (record.round < 3)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("half", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_all_that_a_killed_primary_delivered_is_there_and_nothing_else(
    half: bool, far: Far
) -> None:
    endpoint = far.receiver.endpoint
    proxy = Proxy(endpoint, bytes_of_a_run() - 300, "halt") if half else None
    process = multiprocessing.get_context("spawn").Process(
        target=killed_primary, args=(endpoint if proxy is None else proxy.endpoint, half)
    )
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL
    reached, arrays = far.promoted()
    assert reached == 2
    assert bits(arrays) == expected_bits(far)[2]


def test_the_next_mean_may_be_written_while_the_last_is_applied(far: Far) -> None:
    stream = far.connect()
    first, second, _ = rounds(1, ROUNDS)
    far.hang.clear()
    write_mean(stream, 1)
    assert stream.send(first), "it has come whole, applied or not"
    assert stream.ready()
    write_mean(stream, 2)
    far.hang.set()
    assert stream.send(second)
    reached, arrays = far.promoted()
    assert reached == 2
    assert bits(arrays) == expected_bits(far)[2]


def test_a_standby_that_acknowledges_nothing_is_given_up(far: Far) -> None:
    stream = far.connect(timeout_s=2.0)
    first, second, _ = rounds(1, ROUNDS)
    far.hang.clear()
    write_mean(stream, 1)
    assert stream.send(first)
    write_mean(stream, 2)
    assert not stream.send(second)
    assert stream.reached == 1
    stream.close()
    far.hang.set()
    far.receiver.close()
    assert far.came[1][1] == 1.0
    assert [record for record, _ in far.came[2:]] in ([], [second], [second, DetachStandby()])


class Gate:
    """Passes bytes from a primary to its standby up to some, and the rest once it is opened.

    Little waits in the sockets meanwhile. With `each_s` it passes a little every so many seconds.
    """

    def __init__(self, endpoint: Endpoint, most: int, each_s: float = PATIENCE_S) -> None:
        self._to, self._most = (endpoint.host, endpoint.port), most
        self._each_s = each_s
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.endpoint = replace(endpoint, port=self._listener.getsockname()[1])
        self.opened = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        primary, _ = self._listener.accept()
        self._listener.close()
        with primary, socket.create_connection(self._to) as standby:
            passed = 0
            while True:
                for sock in select.select([primary, standby], [], [])[0]:
                    if sock is primary and passed >= self._most:
                        self.opened.wait(self._each_s)
                    try:
                        data = sock.recv(1 << 16)
                        (standby if sock is primary else primary).sendall(data)
                    except OSError:
                        return
                    if not data:
                        return
                    passed += len(data) if sock is primary else 0


def test_a_line_that_was_given_up_brings_no_changed_memory_when_it_goes_on() -> None:
    far = Far(3 * PIECE_BYTES // 4)
    state_bytes = 3 * sum(each.nbytes for each in far.arrays["params"].values())
    gate = Gate(far.receiver.endpoint, state_bytes + PIECE_BYTES)
    stream = far.connect(gate.endpoint, timeout_s=2.0)
    first, *_ = rounds(1, 1)
    write_mean(stream, 1)
    assert not stream.send(first)
    stream.close()
    for values in stream.mean.values():
        values[:] = np.nan
    gate.opened.set()
    gate.thread.join(PATIENCE_S)
    far.receiver.close()
    assert [record for record, _ in far.came] == [DetachStandby()], "what an earlier one had ended"
    assert far.standby.reached == 0
    assert bits(far.standby.arrays) == bits(far.arrays)


def test_a_slow_cable_is_no_silence() -> None:
    """Each piece takes longer than a standby may be silent."""
    far = Far(PIECE_BYTES // 4)
    gate = Gate(far.receiver.endpoint, 0, each_s=0.01)
    began = time.monotonic()
    stream = far.connect(gate.endpoint, timeout_s=0.3)
    assert time.monotonic() - began > 3 * 0.3
    first, *_ = rounds(1, 1)
    write_mean(stream, 1)
    assert stream.send(first)
    assert far.standby.reached == 1
    stream.close()


def test_what_is_no_step_has_no_mean(far: Far) -> None:
    stream = far.connect()
    (first,) = rounds(1, 1)
    skipped = replace(first, outcome="skipped", skipped=1)
    others = [
        ReplicatedJoin(0, 5, "node/1/2/3"),
        Reconfigure(epoch=4, schedule=((1, (0,)),), newest={0: 5}),
    ]
    for record in [*others, skipped]:
        assert stream.send(record)
    assert stream.reached == 1
    far.receiver.close()
    assert [record for record, _ in far.came[1:]] == [*others, skipped]


def test_a_primary_that_connects_anew_ends_the_earlier_stream_and_its_state(far: Far) -> None:
    first = far.connect()
    assert first.send(ReplicatedJoin(0, 5))
    far.decided = 7
    second = far.connect()
    (record,) = rounds(8, 1)
    write_mean(second, 8)
    assert second.send(record)
    deadline = time.monotonic() + PATIENCE_S
    while first.ready():
        assert time.monotonic() < deadline, "the earlier line goes on"
    assert not first.send(record)
    first.close()
    assert second.ready()
    far.receiver.close()
    assert far.standby.reached == 8


def test_a_record_that_cannot_be_followed_ends_the_stream_and_the_state(far: Far) -> None:
    stream = far.connect()
    _, second, third = rounds(1, ROUNDS)
    stream.send(second)
    assert not (stream.ready() and stream.send(third))
    assert far.standby.reached is None


class Peer:
    """One who knows the secret and says whatever he likes."""

    def __init__(self, endpoint: Endpoint, says: dict[str, Any]) -> None:
        self.is_proven = threading.Event()
        self.has_ended = threading.Event()
        self.connection = TcpConnection(self, endpoint.secret, says)
        dial(self.connection, endpoint)
        self.is_proven.wait(PATIENCE_S)

    def proven(self, connection: TcpConnection, greeting: Any) -> None:
        self.is_proven.set()

    def landing(self, connection: TcpConnection, message: bytes, size: int) -> tuple[Any, Parts]:
        return None, ()

    def arrived(self, connection: TcpConnection, what: Any) -> None:
        pass

    def ended(self, connection: TcpConnection, why: str) -> None:
        self.is_proven.set()
        self.has_ended.set()

    def say(self, *messages: tuple[bytes, bytes]) -> None:
        for message, behind in messages:
            dialling_thread().call(self.connection.send, message, [memoryview(behind)])


def said(kind: Any, content: Any, behind: bytes = b"") -> tuple[bytes, bytes]:
    return msgpack.packb((kind, content)), behind


def record_said(record: Record) -> tuple[bytes, bytes]:
    return said("record", pack_record(record)[HEADER.size :])


W_BYTES, Z_BYTES = bytes(4 * 60), bytes(8 * 5)
BAD_MESSAGES = {
    "no message": [(b"\xc1", b"")],
    "no pair": [(msgpack.packb(("mean",)), b"")],
    "no kind": [said(7, 0)],
    "an unknown kind": [said("moments", 0)],
    "no record": [said("record", b"\x93\x01\x02")],
    "a record that is no bytes": [said("record", 5)],
    "bytes behind a record": [(record_said(ReplicatedJoin(0, 1))[0], b"x")],
    "the second piece first": [said("mean", 1, Z_BYTES)],
    "a piece before": [said("mean", -1, Z_BYTES)],
    "a piece twice": [said("mean", 0, W_BYTES), said("mean", 0, W_BYTES)],
    "a piece too many": [
        said("mean", 0, W_BYTES),
        said("mean", 1, Z_BYTES),
        said("mean", 2, Z_BYTES),
    ],
    "a number that is none": [said("mean", [1], W_BYTES)],
    "a piece too short": [said("mean", 0, W_BYTES[1:])],
    "a piece too long": [said("mean", 0, W_BYTES + b"x")],
    "a state again": [said("state", 0, W_BYTES)],
    "a whole state again": [said("whole", None)],
    "a step without its mean": [record_said(next(rounds(1, 1)))],
    "a step with half its mean": [said("mean", 0, W_BYTES), record_said(next(rounds(1, 1)))],
    "a mean without a step": [said("mean", 0, W_BYTES), record_said(ReplicatedJoin(0, 1))],
}


STATE = [said("state", number, piece) for number, piece in enumerate(3 * [W_BYTES, Z_BYTES])]
"""A state of zeros; spaces are sent in the order of their names."""
BAD_STATES = {
    "a state that is not whole": [*STATE[:-1], said("whole", None)],
    "no state": [said("whole", None)],
    "another order": STATE[1:],
    "a piece too many": [*STATE, said("state", 6, Z_BYTES)],
}


@pytest.mark.parametrize("messages", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_primary_that_says_what_does_not_come_next_is_hung_up_on(
    messages: list[tuple[bytes, bytes]], far: Far
) -> None:
    peer = Peer(far.receiver.endpoint, primary_greeting(0))
    peer.say(*STATE, said("whole", None), *messages)
    assert peer.has_ended.wait(PATIENCE_S)
    assert far.came == [(DetachStandby(), 0.0)], "nothing was followed"
    assert far.standby.reached == 0
    assert set(b"".join(bits(far.standby.arrays).values())) == {0}


@pytest.mark.parametrize("messages", BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_does_not_come_piece_by_piece_is_not_begun_from(
    messages: list[tuple[bytes, bytes]], far: Far
) -> None:
    peer = Peer(far.receiver.endpoint, primary_greeting(0))
    peer.say(*messages)
    assert peer.has_ended.wait(PATIENCE_S)
    assert far.standby.reached is None
    assert far.connect().ready(), "the next primary is served"


@pytest.mark.parametrize("says", [primary_greeting(1), greeting(0)], ids=["another", "a relay"])
def test_whoever_is_not_the_shards_primary_is_hung_up_on(says: dict[str, Any], far: Far) -> None:
    stream = far.connect()
    assert Peer(far.receiver.endpoint, says).has_ended.wait(PATIENCE_S)
    assert stream.send(ReplicatedJoin(0, 5))
    assert far.standby.reached == 0


def test_who_does_not_know_the_secret_takes_no_state_and_gives_none(far: Far) -> None:
    stream = far.connect()
    wrong = replace(far.receiver.endpoint, secret=bytes(32))
    with pytest.raises(LaneError, match="standby of shard 0 cannot be filled"):
        far.connect(wrong)
    assert stream.send(ReplicatedJoin(0, 5))


class FalseStandby:
    """One who knows the secret and acknowledges with whatever he likes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.listener = TcpListener(self, "a false standby", "127.0.0.1", None)

    def proven(self, connection: TcpConnection, greeting: Any) -> None:
        self.listener.admit(connection)
        connection.send(self._answer)

    def landing(self, connection: TcpConnection, message: bytes, size: int) -> tuple[Any, Parts]:
        return None, [memoryview(bytearray(size))] if size else []

    def arrived(self, connection: TcpConnection, what: Any) -> None:
        pass

    def ended(self, connection: TcpConnection, why: str) -> None:
        self.listener.forget(connection)


@pytest.mark.parametrize("answer", [msgpack.packb(9), msgpack.packb(0), msgpack.packb("1"), b""])
def test_a_standby_that_acknowledges_what_was_not_sent_is_hung_up_on(
    answer: bytes, far: Far
) -> None:
    standby = FalseStandby(answer)
    with pytest.raises(LaneError, match="standby of shard 0 cannot be filled"):
        far.connect(standby.listener.endpoint)
    standby.listener.close()


class SlowStandby(FalseStandby):
    """One who acknowledges one message after the other, each a while after the last."""

    def __init__(self, each_s: float) -> None:
        super().__init__(b"")
        self._each_s = each_s
        self._came = 0

    def proven(self, connection: TcpConnection, greeting: Any) -> None:
        self.listener.admit(connection)

    def arrived(self, connection: TcpConnection, what: Any) -> None:
        self._came += 1
        self.listener.thread.loop.call_later(
            self._each_s * self._came, connection.send, msgpack.packb(self._came)
        )


@pytest.mark.slow
def test_a_slow_line_is_waited_for_as_long_as_something_comes(far: Far) -> None:
    timeout_s = 3.0
    standby = SlowStandby(each_s=timeout_s / 4)
    began = time.monotonic()
    stream = far.connect(standby.listener.endpoint, timeout_s)
    assert time.monotonic() - began > timeout_s, "seven messages"
    stream.close()
    standby.listener.close()


def test_nobody_listening_is_one_sentence_with_address_and_port(far: Far) -> None:
    endpoint = far.receiver.endpoint
    far.receiver.close()
    with pytest.raises(LaneError, match=rf"at 127\.0\.0\.1 port {endpoint.port}: .*refused"):
        far.connect(endpoint)


def test_with_rays_certificates_the_stream_goes_by_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in certificates(tmp_path).items():
        monkeypatch.setenv(name, value)
    far = Far(2 * PIECE_BYTES // 4)
    place = (far.receiver.endpoint.host, far.receiver.endpoint.port)
    with socket.create_connection(place, PATIENCE_S) as stranger, pytest.raises(ssl.SSLError):
        ssl.create_default_context().wrap_socket(stranger, server_hostname="127.0.0.1")
    stream = far.connect()
    (first,) = rounds(1, 1)
    write_mean(stream, 1)
    assert stream.send(first)
    stream.close()
    far.close()
