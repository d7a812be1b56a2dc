"""Strangers and workers that went wrong at a shard's port: hung up on, whatever they send."""

import gc
import socket
import threading
import time
import tracemalloc
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from typing_extensions import override

from distnadam.protocol.codec import pack, pack_record
from distnadam.protocol.frames import HEADER, VERSION
from distnadam.protocol.messages import RoundResult
from distnadam.protocol.supervisor_messages import DetachStandby
from distnadam.transport import tcp_listener
from distnadam.transport.tcp_connection import Receiver, TcpConnection, greeting
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.tcp_server import TcpServer
from tests.certificates import certificates
from tests.transport.tcp_shards import ANSWER_S, Host, Shards, gradients, is_hung_up_on


def test_who_does_not_know_the_secret_is_refused_on_either_side(
    shards: Shards, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = replace(shards.all[0].endpoint, secret=b"x" * 32)
    # a listener that only repeats what it hears
    with socket.create_server(("127.0.0.1", 0)) as echo:

        def answer() -> None:
            sock, _ = echo.accept()
            with sock:
                sock.sendall(framed({"version": VERSION, "nonce": b"n" * 32}))
                sock.sendall(sock.recv(4096))
                sock.recv(1)

        threading.Thread(target=answer, daemon=True).start()
        fake = replace(shards.all[1].endpoint, port=echo.getsockname()[1])
        host = Host(shards, {0: wrong, 1: fake})
        assert not host.relay.is_by_tcp(0) and not host.relay.is_by_tcp(1)
        host.close()
    assert "shard 0 cannot be reached at 127.0.0.1 port " in caplog.text
    assert "the peer does not know the secret" in caplog.text


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
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with socket.create_connection(place, ANSWER_S) as stranger:
        assert len(stranger.recv(4096)) > 32  # its nonce
        stranger.sendall(garbage)
        if garbage in (b"", GARBAGE["half a head"]):
            stranger.shutdown(socket.SHUT_WR)
        assert is_hung_up_on(stranger)
    numbers = [worker.push(1, gradients(0, worker.rank)) for worker in workers]
    assert {a.round for a in workers[0].collect(numbers[0]).values()} == {1}
    assert host.carried == []
    host.close()


@pytest.mark.parametrize("tls", [False, True])
def test_a_stranger_who_says_nothing_is_hung_up_on_in_time(
    tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (certificates(tmp_path) if tls else {}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tcp_listener, "HANDSHAKE_S", 0.2)
    shards = Shards()
    began = time.monotonic()
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with socket.create_connection(place, ANSWER_S) as stranger:
        while not is_hung_up_on(stranger):
            pass
    assert 0.1 < time.monotonic() - began < 5.0
    shards.close()


@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "127.0.0.2"), ("::1", "127.0.0.1")])
def test_a_shard_listens_at_its_own_address_alone_with_a_secret_of_its_own(
    host: str, other: str, shards: Shards
) -> None:
    spec = shards.all[0].spec
    servers = [TcpServer(spec, shards.all[0].host.deliver, host, None) for _ in range(2)]
    secrets = {server.endpoint.secret for server in servers}
    assert len(secrets) == 2 and all(len(secret) == 32 for secret in secrets)
    peer = Peer()
    endpoint = servers[0].endpoint
    dial(TcpConnection(peer, endpoint.secret, greeting(1)), endpoint)
    assert peer.has_been_proven.wait(ANSWER_S)
    with pytest.raises(ConnectionRefusedError):
        dial(TcpConnection(peer, endpoint.secret, greeting(1)), replace(endpoint, host=other))
    for server in servers:
        server.close()


@pytest.mark.parametrize("tls", [False, True])
def test_a_flood_of_strangers_costs_bounded_connections_and_memory_and_leaves_none(
    tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say nothing or half a handshake; with TLS, no connection is made for them to hang up."""
    for name, value in (certificates(tmp_path) if tls else {}).items():
        monkeypatch.setenv(name, value)
    shards = Shards()
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    Host(shards).close()  # what is made once, is made
    tracemalloc.start()
    try:
        with ExitStack() as stack:
            strangers = []
            for number in range(200):
                sock = stack.enter_context(socket.create_connection(place, ANSWER_S))
                with suppress(OSError):  # it is hung up on already
                    sock.sendall(HALF_A_HANDSHAKE[: 1000 * (number % 2)])
                strangers.append(sock)
            host = Host(shards)
            assert host.relay.is_by_tcp(0)
            assert 0 < sum(map(is_open, strangers)) <= MOST_STRANGERS
            used = tracemalloc.get_traced_memory()[1]
            assert used < MOST_BYTES[tls], used
            host.close()
        deadline = time.monotonic() + ANSWER_S
        while (left := bytes_in_use()) > LEFT_BYTES:
            assert time.monotonic() < deadline, f"{left} bytes of strangers that are gone"
            time.sleep(0.01)
    finally:
        tracemalloc.stop()
    began = time.monotonic()
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(place, ANSWER_S))
        shards.close()
    assert time.monotonic() - began < 5.0, "who waits to be proven does not hold up the end"


MOST_STRANGERS = 64
MOST_BYTES = {False: 2 << 20, True: 80 << 20}
"""The memory of all, without TLS and with it, whose asyncio has 256 kB for each."""
LEFT_BYTES = 1 << 20
"""Less than the two ends have, with TLS, that the worker's connection has opened meanwhile."""
HALF_A_HANDSHAKE = (1024).to_bytes(4, "little") + bytes(1000)


def bytes_in_use() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def is_open(sock: socket.socket) -> bool:
    """Whether the other end has not hung up."""
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


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


BAD_MESSAGES = {
    "no message": b"\xc1",
    "an answer": pack(1, result())[HEADER.size :],
    "a standby's record": pack_record(DetachStandby())[HEADER.size :],
}


@pytest.mark.parametrize("message", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
@pytest.mark.parametrize("num_bytes", [0, 7])
def test_a_peer_that_sends_what_no_relay_does_is_hung_up_on(
    message: bytes, num_bytes: int, shards: Shards
) -> None:
    peer = Peer()
    endpoint = shards.all[0].endpoint
    line = TcpConnection(peer, endpoint.secret, greeting(1))
    dial(line, endpoint)
    parts = [memoryview(bytes(num_bytes))] if num_bytes else []
    assert peer.has_been_proven.wait(ANSWER_S)
    dialling_thread().call(line.send, message, parts)
    assert peer.has_ended.wait(ANSWER_S)
    assert shards.all[0].describe().round == 0


def test_a_peer_that_greets_as_no_relay_does_is_hung_up_on(shards: Shards) -> None:
    peer = Peer()
    endpoint = shards.all[0].endpoint
    dial(TcpConnection(peer, endpoint.secret, {**greeting(1), "relay": "me"}), endpoint)
    assert peer.has_ended.wait(ANSWER_S)


class Peer(Receiver):
    """Who knows the secret, and listens only to when it is hung up on."""

    def __init__(self) -> None:
        self.has_been_proven = threading.Event()
        self.has_ended = threading.Event()

    @override
    def proven(self, connection: TcpConnection, greeting: Any) -> None:
        self.has_been_proven.set()

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        self.has_ended.set()
