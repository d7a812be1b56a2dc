"""Which way leads from node to node, and what is said where one does not."""

from typing import Any

import pytest

from distnadam.backends.ray.links import _measured, _Node, _unreachable, _way
from distnadam.backends.ray.nodes import node_named
from distnadam.errors import ConfigError
from distnadam.transport.link import Way
from distnadam.transport.tcp_connection import Endpoint

WORDS = {"a" * 56: "10.0.0.1 (aaaaaaaa)", "b" * 56: "10.0.0.2 (bbbbbbbb)"}
A, B = WORDS


def node(**how: Any) -> _Node:
    plain = {
        "endpoint": Endpoint("10.0.0.2", 7003, b""),
        "refusal": None,
        "congestion": "bbr",
        "unshared": None,
        "memory": 2**30,
    }
    return _Node(**{**plain, **how})


DEAF = "any port is not to be had"


@pytest.mark.parametrize(
    ("sender", "there", "refusal", "carrier", "why"),
    [
        (B, node(), None, "shared memory", "the same node"),
        (B, node(unshared="no memfd"), None, "Ray objects", "does not work there: no memfd"),
        (A, node(), None, "TCP", "it answers at port 7003"),
        (A, node(), "it timed out", "Ray objects", "it timed out"),
        (A, node(endpoint=None, refusal=DEAF), None, "Ray objects", DEAF),
    ],
)
def test_a_way_has_a_carrier_and_a_reason(
    sender: str, there: _Node, refusal: str | None, carrier: str, why: str
) -> None:
    way = _way(WORDS, sender, B, there, refusal)
    assert (way.sender, way.receiver, way.carrier) == (WORDS[sender], WORDS[B], carrier)
    assert why in way.why


def way(sender: str, receiver: str, carrier: str, why: str = "") -> Way:
    return Way(sender=sender, receiver=receiver, carrier=carrier, why=why)


def test_each_node_that_others_cannot_reach_is_one_sentence() -> None:
    ways = [
        way("a", "a", "Ray objects", "no memfd"),
        way("a", "b", "Ray objects", "timed out"),
        way("c", "b", "Ray objects", "timed out"),
        way("b", "a", "TCP"),
        way("a", "c", "TCP"),
        way("b", "c", "Ray objects", "Connection refused"),
    ]
    found = list(_unreachable(ways, {"a": 1, "b": 2, "c": 3}))
    assert [sentence.partition(";")[0] for sentence in found] == [
        "a, c cannot reach b at port 2 (timed out)",
        "b cannot reach c at port 3 (Connection refused)",
    ]
    assert all("Options(port_range=...)" in sentence for sentence in found)


@pytest.mark.parametrize("carrier", ["shared memory", "Ray objects"])
def test_only_a_way_by_tcp_is_measured(carrier: str) -> None:
    nowhere = node(endpoint=Endpoint("127.0.0.1", 1, b""), congestion="cubic")
    told = _measured("b", nowhere, way("a", "b", carrier))
    assert (told.link, told.why_not, told.congestion[1]) == (None, None, "cubic")
    tried = _measured("b", nowhere, way("a", "b", "TCP"))
    assert tried.link is None
    assert "127.0.0.1 port 1 cannot be reached" in str(tried.why_not)


NODES = [
    {
        "NodeID": node,
        "Alive": True,
        "NodeManagerAddress": address,
        "NodeManagerHostname": "one",
        "NodeName": name,
    }
    for node, address, name in ((A, "10.0.0.1", "x"), (B, "10.0.0.2", "y"))
]


@pytest.mark.parametrize(
    ("host", "here", "found"),
    [
        ("10.0.0.2", A, B),
        ("10.0.0.1", A, A),
        ("one", A, B),
        ("one", B, A),
        ("y", A, B),
        (B[:8], A, B),
    ],
)
def test_a_host_is_named_by_address_name_or_id(host: str, here: str, found: str) -> None:
    assert node_named(host, NODES, besides=here) == found


def test_a_host_that_is_no_node_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"'10.9.9.9': is no node .* are: 10.0.0.1, 10.0.0.2"):
        node_named("10.9.9.9", NODES, besides=A)
