"""Gradients that travel ahead of their push: the same bits, whatever becomes of them on the way."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.errors import LaneError
from distnadam.protocol.messages import Push, PushSlice
from distnadam.transport.push_parts import PushParts
from tests.transport.tcp_shards import (
    CUTS,
    EPOCH,
    HANDSHAKE_BYTES,
    PARAMS,
    Host,
    Proxy,
    Shards,
    Worker,
    gradients,
    same,
    stepped_here,
)

RANGES = {"float32": (10, 30), "float64": (0, 4)}


def part(worker: Worker, round: int, space: str, begin: int, end: int) -> PushSlice:
    return PushSlice(
        epoch=EPOCH,
        rank=worker.rank,
        incarnation=worker.incarnation,
        round=round,
        space=space,
        begin=begin,
        end=end,
    )


def ahead(worker: Worker, round: int) -> dict[int, int]:
    """Send two slices of a push to each shard: the last third of float32, and some of float64."""
    counts = {}
    for shard, ranges in enumerate(CUTS):
        low, high = ranges["float32"]
        slices = [part(worker, round, "float32", high - (high - low) // 3, high)]
        low, high = ranges["float64"]
        slices += [part(worker, round, "float64", low + 1, high)] if high - low > 1 else []
        for each in slices:
            worker.client.tell(shard, each)
        counts[shard] = len(slices)
    return counts


def sliced(pushes: Mapping[int, Push], counts: Mapping[int, int]) -> dict[int, Push]:
    return {shard: replace(push, slices=counts[shard]) for shard, push in pushes.items()}


@pytest.fixture
def proxies(shards: Shards) -> list[Proxy]:
    return [Proxy(shard.endpoint) for shard in shards.all]


@pytest.fixture
def host(shards: Shards, proxies: list[Proxy]) -> Iterator[Host]:
    host = Host(shards, {i: proxy.endpoint for i, proxy in enumerate(proxies)})
    yield host
    host.close()


def round_of(workers: list[Worker], round: int) -> list[dict[int, Any]]:
    """Step once, rank 0 with slices and the others without."""
    numbers = []
    for worker in workers:
        pushes = worker.pushes(round, gradients(round - 1, worker.rank))
        if worker.rank == 0:
            pushes = sliced(pushes, ahead(worker, round))
        numbers.append(worker.client.post(pushes))
    return [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]


def test_slices_count_as_if_they_had_come_with_the_push_and_cross_the_cable_once(
    host: Host, proxies: list[Proxy]
) -> None:
    workers = [host.worker(0), host.worker(1)]
    for round in (1, 2, 3):
        answers = round_of(workers, round)
    for worker, each in zip(workers, answers, strict=True):
        assert same(worker.parameters(each), stepped_here(3))
    assert host.carried == []
    model = sum(array.nbytes for array in PARAMS.values())
    sent = sum(proxy.passed["there"] for proxy in proxies)
    assert 3 * 2 * model <= sent <= 1.01 * 3 * 2 * model + 2 * HANDSHAKE_BYTES


def test_slices_that_the_push_does_not_count_are_forgotten(host: Host) -> None:
    workers = [host.worker(0), host.worker(1)]
    garbage = gradients(7, 7)
    for round in (1, 2):
        numbers = []
        for worker in workers:
            worker.pushes(round, garbage)
            ahead(worker, round)
            pushes = worker.pushes(round, gradients(round - 1, worker.rank))
            numbers.append(worker.client.post(pushes))
        answers = [w.collect(number) for w, number in zip(workers, numbers, strict=True)]
    for worker, each in zip(workers, answers, strict=True):
        assert same(worker.parameters(each), stepped_here(2))


@pytest.mark.parametrize("most", [HANDSHAKE_BYTES + 1000, 300_000, 700_000])
def test_a_line_that_ends_in_a_slice_or_between_slices_and_push_changes_no_bit(
    most: int, shards: Shards
) -> None:
    proxies = [Proxy(shard.endpoint, most=most) for shard in shards.all]
    host = Host(shards, {i: proxy.endpoint for i, proxy in enumerate(proxies)})
    workers = [host.worker(0), host.worker(1)]
    answers = round_of(workers, 1)
    for worker, each in zip(workers, answers, strict=True):
        assert same(worker.parameters(each), stepped_here(1))
    assert host.carried
    host.close()


def test_slices_of_another_round_or_worker_are_not_taken_for_those_of_a_push(host: Host) -> None:
    workers = [host.worker(0), host.worker(1)]
    workers[0].pushes(1, gradients(7, 7))
    counts = ahead(workers[0], 5)
    pushes = workers[0].pushes(1, gradients(0, 0))
    numbers = [
        workers[0].client.post(sliced(pushes, counts)),
        workers[1].push(1, gradients(0, 1)),
    ]
    answers = [w.collect(number) for w, number in zip(workers, numbers, strict=True)]
    for worker, each in zip(workers, answers, strict=True):
        assert same(worker.parameters(each), stepped_here(1))


def whole() -> dict[str, np.ndarray]:
    return {"float32": np.zeros(20, np.float32), "float64": np.zeros(4)}


def piece(space: str, begin: int, end: int, round: int = 1) -> PushSlice:
    return PushSlice(epoch=1, rank=0, incarnation=1, round=round, space=space, begin=begin, end=end)


def push(slices: int, round: int = 1) -> Push:
    return Push(epoch=1, rank=0, incarnation=1, round=round, gradients=whole(), slices=slices)


@given(st.sets(st.integers(0, 20), min_size=2), st.booleans())
def test_slices_and_the_rest_are_the_whole_push(cuts: set[int], odd: bool) -> None:
    parts, memory = PushParts(RANGES), whole()
    bounds = sorted(cuts)
    pieces = list(pairwise(bounds))[odd::2]
    for value, (begin, end) in enumerate(pieces, 1):
        (view,) = parts.add(piece("float32", 10 + begin, 10 + end), lambda: memory)
        np.frombuffer(view, np.float32)[:] = value
    found = parts.rest(push(len(pieces)))
    if not pieces:
        assert found is None
        return
    assert found is not None
    flat, missing = found
    assert flat is memory
    assert sum(each.nbytes for each in missing) == 4 * 4 * 2 + 4 * sum(memory["float32"] == 0)
    for each in missing:
        each[:] = b"\xff" * each.nbytes
    assert not (memory["float32"] == 0).any() and not (memory["float64"] == 0).any()


@pytest.mark.parametrize(
    "bad",
    [
        piece("float32", 9, 12),
        piece("float32", 28, 31),
        piece("float32", 12, 12),
        piece("float32", 14, 12),
        piece("int8", 0, 1),
        piece("float32", 11, 13),
    ],
)
def test_a_slice_of_what_the_shard_has_not_or_has_already_is_refused(bad: PushSlice) -> None:
    parts = PushParts(RANGES)
    parts.add(piece("float32", 12, 15), whole)
    with pytest.raises(LaneError, match="slice of "):
        parts.add(bad, whole)


def test_slices_of_a_worker_that_is_gone_are_forgotten() -> None:
    parts = PushParts(RANGES)
    parts.add(piece("float32", 12, 15), whole)
    parts.forget(0)
    parts.forget(1)
    assert parts.rest(push(1)) is None


def test_a_relay_drops_a_slice_of_another_cut_and_the_push_brings_it(host: Host) -> None:
    workers = [host.worker(0), host.worker(1)]
    pushes = workers[0].pushes(1, gradients(0, 0))
    for shard, ranges in enumerate(CUTS):
        high = ranges["float32"][1]
        workers[0].client.tell(shard, part(workers[0], 1, "float32", high - 5, high + 5))
    numbers = [
        workers[0].client.post(sliced(pushes, {0: 1, 1: 1})),
        workers[1].push(1, gradients(0, 1)),
    ]
    answers = [w.collect(number) for w, number in zip(workers, numbers, strict=True)]
    for worker, each in zip(workers, answers, strict=True):
        assert same(worker.parameters(each), stepped_here(1))


def test_only_the_push_of_the_same_round_with_as_many_slices_has_a_rest() -> None:
    for other in (push(2), push(0), push(1, round=2)):
        parts = PushParts(RANGES)
        parts.add(piece("float32", 12, 15), whole)
        assert parts.rest(other) is None
        assert parts.rest(push(1)) is None  # forgotten
