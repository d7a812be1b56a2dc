"""Measuring the way to another host: over real sockets, all in this process."""

import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.transport.link import LinkServer, carriers, congestion_control, measure, reach
from distnadam.transport.tcp_connection import TcpConnection, greeting
from distnadam.transport.tcp_dial import dial

MEASURE_S = 60.0


class Silent(LinkServer):
    """Takes everything and answers nothing."""

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[LinkServer]:
    server = LinkServer("127.0.0.1", None)
    yield server
    server.close()


def test_a_measured_link_has_both_speeds_and_a_round_trip(server: LinkServer) -> None:
    link = measure(server.endpoint, MEASURE_S)
    assert 0 < link.round_trip_s < 1
    for speed in (link.sent_bytes_per_s, link.received_bytes_per_s):
        assert 1e6 < speed < 1e11
    reach(server.endpoint)


def test_a_port_that_nobody_listens_at_and_a_wrong_secret_are_one_sentence(
    server: LinkServer,
) -> None:
    stranger = replace(server.endpoint, secret=secrets.token_bytes(32))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for endpoint, why in (
        (replace(server.endpoint, port=port), "Connection refused"),
        (stranger, "the peer"),
    ):
        for ask in (reach, lambda where: measure(where, MEASURE_S)):
            with pytest.raises(LaneError, match=rf"127\.0\.0\.1 port {endpoint.port} .*{why}"):
                ask(endpoint)


def test_who_never_answers_is_waited_for_no_longer_than_was_said() -> None:
    silent = Silent("127.0.0.1", None)
    began = time.monotonic()
    with pytest.raises(LaneError, match=rf"port {silent.endpoint.port}: nothing came in time"):
        measure(silent.endpoint, 0.2)
    assert time.monotonic() - began < 10
    silent.close()


@pytest.mark.parametrize("wanted", [-1, 1 << 40, "much", None])
def test_who_asks_for_what_is_no_measurement_is_hung_up_on(wanted: Any, server: LinkServer) -> None:
    asker = Silent("127.0.0.1", None)
    ended: list[str] = []

    class Asker(Silent):
        @override
        def proven(self, connection: TcpConnection, greeting: Any) -> None:
            connection.send(msgpack.packb(wanted))

        @override
        def ended(self, connection: TcpConnection, why: str) -> None:
            ended.append(why)

    asker = Asker("127.0.0.1", None)
    connection = TcpConnection(asker, server.endpoint.secret, greeting(0))
    dial(connection, server.endpoint)
    while not ended:
        pass  # the test's own time limit bounds it
    asker.close()


def test_the_congestion_control_is_the_systems() -> None:
    with socket.socket() as probe:
        said = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert congestion_control() == said.rstrip(b"\0").decode()


@pytest.mark.parametrize(
    ("transport", "ports", "words"),
    [
        ("auto", None, "shared memory within a node, TCP at any port between nodes, "),
        ("auto", (7000, 7063), "TCP at ports 7000 to 7063 between nodes"),
        ("objects", None, "Ray objects, as Options(transport='objects') says"),
    ],
)
def test_the_carriers_follow_from_the_options(
    transport: str, ports: tuple[int, int] | None, words: str
) -> None:
    assert words in carriers(transport, ports)
