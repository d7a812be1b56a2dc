"""The handshake and the frames of TCP, byte by byte; the sockets are in `test_tcp.py`."""

import logging
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from distnadam.protocol.frames import VERSION
from distnadam.transport.tcp_connection import TcpConnection
from tests.transport.tcp_wire import (
    FRAMES,
    GREETING,
    HEAD,
    SECRET,
    WHOLE,
    Sink,
    conversation,
    feed,
    frame,
    made,
    new_shards_end,
    new_workers_end,
    parse,
    said,
    spoiled,
)


def pieces(rng: random.Random) -> Iterator[int]:
    while True:
        yield rng.choice([1, 2, 11, 12, 13, 100, 70_000])


def test_both_ends_speak_as_written_and_frames_cut_anywhere_come_whole_in_order() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        cut = pieces(rng)
        sinks = Sink(), Sink()
        shard, worker = TcpConnection(sinks[0], SECRET), TcpConnection(sinks[1], SECRET, GREETING)
        to_worker, to_shard = made(shard), made(worker)
        feed(worker, to_shard, to_worker.take(), cut)
        feed(shard, to_worker, to_shard.take(), cut)
        feed(worker, to_shard, to_worker.take(), cut)
        assert (shard.is_proven, worker.is_proven) == (True, True)
        sent = [rng.choice(FRAMES) for _ in range(5)]
        for one in sent:
            length, _ = HEAD.unpack_from(one)
            message, behind = one[HEAD.size :][:length], one[HEAD.size :][length:]
            worker.send(message, [memoryview(behind)])
            shard.send(message, [memoryview(behind)])
        for connection, wire, other in (shard, to_worker, to_shard), (worker, to_shard, to_worker):
            feed(connection, wire, other.take(), cut)
        for sink in sinks:
            assert [frame(*each) for each in sink.messages] == sent


class Errors(logging.Handler):
    """Notes what is logged as an error: what nobody expected of a connection."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(logging.Formatter().format(record))


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        (0, 20_000),
        *(pytest.param(seed, 250_000, marks=pytest.mark.nightly) for seed in range(1, 5)),
    ],
)
@pytest.mark.timeout(900)
def test_no_bytes_whatever_do_more_than_hang_up(seed: int, count: int) -> None:
    """Conversations with bits flipped and frames cut, lost, repeated, swapped, huge and bombs, and
    random bytes: each end takes what a plain parser takes, and hangs up where that does.
    """
    rng = random.Random(seed)
    errors, seen = Errors(), Counter[str]()
    logger = logging.getLogger("distnadam")
    logger.addHandler(errors)
    logger.propagate = False
    cut = pieces(rng)
    try:
        for number in range(count):
            is_shard = rng.random() < 0.7
            end, sink, wire, handshake = new_shards_end() if is_shard else new_workers_end()
            frames = conversation(rng)
            if rng.random() < 0.7:
                data = handshake + spoiled(frames or [b""], rng)
            else:
                data = spoiled([handshake, *frames], rng)
            feed(end, wire, data, WHOLE if rng.random() < 0.8 else cut)
            expected = parse(data, handshake)
            got = (end.is_proven, sink.proofs, sink.messages, wire.aborted)
            assert got == (
                expected.proven,
                int(expected.proven),
                expected.messages,
                expected.hangs_up,
            ), f"input {number}: {data.hex()}"
            assert not errors.seen, f"input {number}: {data.hex()}: {errors.seen}"
            seen["proven" if end.is_proven else "not proven"] += 1
            seen["hung up on" if wire.aborted else "listened to"] += 1
            seen["messages"] += len(sink.messages)
    finally:
        logger.propagate = True
        logger.removeHandler(errors)
    assert min(seen.values()) > count / 20, seen


def test_bytes_that_are_announced_cost_no_memory_before_they_come() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        ends = []
        for _ in range(20):
            end, _, wire, _ = new_shards_end()
            feed(end, wire, HEAD.pack(1 << 10, 0) + bytes(1000), WHOLE)  # half a handshake
            ends.append((end, wire))
        assert not any(wire.aborted for _, wire in ends)
        assert tracemalloc.get_traced_memory()[0] - before < 20 * 8192
        proven, _, wire, handshake = new_shards_end()
        feed(proven, wire, handshake + HEAD.pack(1 << 28, 0) + bytes(100_000), WHOLE)
        assert proven.is_proven and not wire.aborted
        assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_handshake_that_is_replayed_to_another_connection_does_not_prove() -> None:
    _, _, _, heard = new_shards_end()
    other, sink, wire, _ = new_shards_end()
    feed(other, wire, heard, WHOLE)
    assert wire.aborted and not other.is_proven and not sink.proofs


def test_a_false_proof_is_refused() -> None:
    end, _, wire, _ = new_workers_end()
    feed(end, wire, said({"proof": b"x" * 32}), WHOLE)
    assert wire.aborted and not end.is_proven


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, None, "3"])
def test_a_peer_of_another_version_is_refused_by_name_on_either_side(version: Any) -> None:
    shard, _, to_worker, hello = new_shards_end(version=version)
    feed(shard, to_worker, hello, WHOLE)
    worker = TcpConnection(Sink(), SECRET, GREETING)
    to_shard = made(worker)
    feed(worker, to_shard, said({"version": version, "nonce": b"n" * 32}), WHOLE)
    assert to_shard.sent == b""  # nothing that could prove to it
    for end, wire in ((shard, to_worker), (worker, to_shard)):
        assert wire.aborted and not end.is_proven
        assert f"expected version {VERSION} of the protocol, got {version!r}" in end._why
