"""What a status says of a step that waits, and of the bytes between hosts."""

from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group
from distnadam.client.status import RunningOptimizer, ShardStatus, Status, _hosts, awaited
from distnadam.protocol.messages import Describe, Description

GRADIENTS = {"w": np.ones(5000, np.float32)}


def shard(index: int, round: int | None = 7, **how: Any) -> ShardStatus:
    plain = {"node": "10.0.0.1 (abc)", "state": "collecting pushes", "idle_s": 0.25}
    return ShardStatus(index=index, round=round, **{**plain, **how})


def push(ranks: str, shards: str, ago_s: float = 0.2) -> str:
    return f"the push of {ranks} to {shards}, which computed last {ago_s} s ago"


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        (
            [shard(0, waits_for=(1,), idle_s=3.0), shard(1, waits_for=(1,), idle_s=3.2)],
            push("rank 1", "shards 0, 1", 3.2),
        ),
        (
            [shard(0, waits_for=(0, 2)), shard(1, waits_for=(2,))],
            f"{push('ranks 0, 2', 'shard 0')}; {push('rank 2', 'shard 1')}",
        ),
        ([shard(0, 8, waits_for=(0,)), shard(1, state="stepping")], "shard 1: stepping"),
        (
            [shard(0, 8, waits_for=(0,)), shard(1, waits_for=(3,))],
            push("rank 3", "shard 1"),
        ),
        ([shard(0, waits_for=(1,)), shard(1, None, state="silent")], "shard 1, which is silent"),
        (
            [shard(0, None, state="dead"), shard(1, None, state="silent")],
            "shard 0, which is dead; shard 1, which is silent",
        ),
    ],
)
def test_what_a_step_waits_for_is_named(shards: list[ShardStatus], words: str) -> None:
    assert awaited(shards) == words


def look(moved: dict[tuple[int, str, str], int], at: float) -> Status:
    return Status(
        name="seen",
        step=1,
        round=1,
        skipped=0,
        lr=0.1,
        steps_per_s=None,
        shards=(),
        workers={0: "computing"},
        replicas=0,
        checkpoint=None,
        awaited="",
        hosts=(),
        moved=moved,
        at=at,
    )


def test_a_host_sends_and_receives_what_all_shards_saw_since_the_last_look() -> None:
    earlier = look({(0, "a", "b"): 1000, (1, "b", "a"): 900, (2, "a", "b"): 10_000}, at=10.0)
    now = {(0, "a", "b"): 3000, (1, "b", "a"): 900, (2, "a", "b"): 500, (2, "c", "a"): 40}
    rates = {each.host: each for each in _hosts(now, earlier, 12.0)}
    assert (rates["a"].sent_bytes_per_s, rates["a"].received_bytes_per_s) == (1250.0, 20.0)
    assert (rates["b"].sent_bytes_per_s, rates["b"].received_bytes_per_s) == (0.0, 1250.0)
    assert (rates["c"].sent_bytes_per_s, rates["c"].received_bytes_per_s) == (20.0, 0.0)
    first = _hosts(now, None, 12.0)
    assert [(each.host, each.sent_bytes_per_s) for each in first] == [
        ("a", None),
        ("b", None),
        ("c", None),
    ]


def test_plain_data_has_neither_clock_nor_totals() -> None:
    data = look({(0, "a", "b"): 1}, at=1.0).to_dict()
    assert data["workers"] == [{"rank": 0, "state": "computing"}]
    assert {"awaited", "hosts"} < data.keys()
    assert not {"moved", "at"} & data.keys()


def test_a_shard_says_how_long_ago_it_computed() -> None:
    with DistNadam(backend="local").build(GRADIENTS) as optimizer:
        backend: Any = optimizer.shards.backend
        host = backend.transport.hosts[0]

        def described() -> Description:
            found: Description = host.send(Describe()).result()
            return found

        before = described().idle_s
        while (later := described().idle_s) < before + 0.01:
            pass
        optimizer.apply_gradients(GRADIENTS)
        assert described().idle_s < later
        assert described().traffic == {}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "nadam"),
        (
            {"formula": "adam", "weight_decay": 0.125, "decoupled_weight_decay": False},
            "adam, weight decay 0.125 (coupled)",
        ),
        (
            {"maximize": True, "groups": [Group("w", trainable=False), Group("b", lr=0.5)]},
            "nadam, maximize, groups 'w' (frozen), 'b'",
        ),
    ],
)
def test_a_status_says_what_steps(config: dict[str, Any], words: str) -> None:
    params = {**GRADIENTS, "b": np.ones(3, np.float32)}
    with DistNadam(**config, backend="local").build(params) as optimizer:
        backend: Any = optimizer.shards.backend
        described = backend.transport.hosts[0].send(Describe(spec=True)).result()
        assert RunningOptimizer(backend, described.spec).status().method == words
