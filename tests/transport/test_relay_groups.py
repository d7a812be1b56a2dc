"""Groups through a relay: a group's gradients cross the cable once, and whatever befalls its ranks
no bit changes and nobody waits for ever.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ml_dtypes
import pytest

from distnadam.errors import SupersededWorker
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.messages import GroupPush, Push, RoundResult
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.tensors.arrays import Flat, cut_flat
from distnadam.transport import far_shard
from tests.eventually import eventually
from tests.transport.tcp_shards import (
    ANSWER_S,
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

IN_PAIRS = NadamConfig(sum_group=2)


@pytest.fixture
def three() -> Iterator[Host]:
    """Ranks 0 and 1, a group, through a relay; rank 2 elsewhere."""
    shards = Shards(IN_PAIRS, num_workers=3)
    host = Host(shards)
    yield host
    host.close()
    shards.close()


def post(worker: Worker, round: int, dtype: Any = "float32") -> int:
    return worker.push(round, gradients(round - 1, worker.rank, dtype))


def step(workers: list[Worker], round: int, dtype: Any = "float32") -> list[dict[int, Any]]:
    numbers = [post(worker, round, dtype) for worker in workers]
    return [w.collect(number) for w, number in zip(workers, numbers, strict=True)]


def push_elsewhere(host: Host, rank: int, incarnation: int, round: int = 1) -> list[Future[Any]]:
    """Push as a worker whose gradients come by calls, parameters wanted."""
    return [
        shard.host.send(
            Push(
                epoch=EPOCH,
                rank=rank,
                incarnation=incarnation,
                round=round,
                gradients=cut_flat(gradients(round - 1, rank), cut),
                want_parameters=True,
            )
        )
        for shard, cut in zip(host.shards.all, CUTS, strict=True)
    ]


def whole_of(answers: list[Future[Any]]) -> Flat:
    """The parameters that answers bring."""
    whole = {space: array.copy() for space, array in PARAMS.items()}
    for cut, answer in zip(CUTS, answers, strict=True):
        result: RoundResult = answer.result(ANSWER_S)
        assert result.parameters is not None
        for space, array in cut_flat(whole, cut).items():
            array[:] = result.parameters[space]
    return whole


def stepped_by_calls() -> Flat:
    """The parameters after one round of ranks 0 to 2, each pushing for itself."""
    shards = Shards(IN_PAIRS, num_workers=3)
    host = Host(shards)
    answers = [push_elsewhere(host, rank, shards.join(rank)) for rank in range(3)]
    whole = whole_of(answers[-1])
    host.close()
    shards.close()
    return whole


def pushed(host: Host) -> list[set[int]]:
    """The ranks whose pushes each shard has."""
    return [{0, 1, 2} - set(shard.describe().waiting_for) for shard in host.shards.all]


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_a_groups_gradients_cross_the_cable_once_with_the_bits_of_calls(dtype: Any) -> None:
    shards = Shards(IN_PAIRS)
    proxies = [Proxy(shard.endpoint) for shard in shards.all]
    host = Host(shards, {i: proxy.endpoint for i, proxy in enumerate(proxies)})
    workers = [host.worker(0), host.worker(1)]
    step(workers, 1, dtype)
    before = sum(proxy.passed["there"] for proxy in proxies)
    for round in (2, 3):
        answers = step(workers, round, dtype)
    whole = sum(array.nbytes for array in PARAMS.values())
    there = sum(proxy.passed["there"] for proxy in proxies) - before
    assert 2 * whole <= there <= 1.01 * 2 * whole
    right = stepped_here(3, dtype, sum_group=2)
    assert all(same(w.parameters(a), right) for w, a in zip(workers, answers, strict=True))
    assert host.carried == []
    host.close()
    shards.close()


RATE = RoundSettings(overrides=packed_overrides(0.5, None, None))
LACKS = RoundSettings(absent=frozenset({1}))


@pytest.mark.parametrize(
    ("says", "outcome", "why"),
    [
        ((RoundSettings(micro_steps=2), RoundSettings(micro_steps=2)), "applied", None),
        (
            (RoundSettings(micro_steps=2), ORDINARY),
            "disagreed",
            "micro_steps must be equal on all ranks: rank 0 has 2, rank 1 has 1",
        ),
        ((ORDINARY, RoundSettings(found_inf=True)), "voted", "rank 1 overflowed"),
        ((RATE, RATE), "applied", None),
        ((LACKS, ORDINARY), "applied", None),
        (
            (RATE, ORDINARY),
            "disagreed",
            "overrides must be equal on all ranks: rank 0 has lr=0.5, rank 1 has none",
        ),
    ],
)
def test_what_a_groups_ranks_say_of_a_round_goes_with_its_sum(
    says: tuple[RoundSettings, ...], outcome: str, why: str | None
) -> None:
    shards = Shards(replace(IN_PAIRS, clocks="tensor"))
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    numbers = []
    for worker, each in zip(workers, says, strict=True):
        pushes = worker.pushes(1, gradients(0, worker.rank))
        for push in pushes.values():
            push.settings = each
            if each.found_inf:
                push.gradients, push.rejection = None, "rank 1 overflowed"
        numbers.append(worker.client.post(pushes))
    for worker, number in zip(workers, numbers, strict=True):
        for answer in worker.collect(number).values():
            assert (answer.round, answer.outcome, answer.rejection) == (1, outcome, why)
    for shard in shards.all:
        counted = shard.host.shard.progress.counted
        assert [counted[rank].settings for rank in (0, 1)] == list(says)
    host.close()
    shards.close()


def test_clipping_by_norm_takes_its_two_phases_for_a_group() -> None:
    shards = Shards(NadamConfig(sum_group=2, global_clipnorm=0.5))
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    measured = step(workers, 1)
    sums = [[(t, s.tobytes()) for t, s in answers[0].sums] for answers in measured]
    assert sums[0] == sums[1]
    host.close()
    shards.close()


def test_a_group_that_is_partly_elsewhere_comes_singly_and_has_the_same_bits(three: Host) -> None:
    first = three.worker(0)
    number = post(first, 1)
    push_elsewhere(three, 1, three.shards.join(1))
    answers = push_elsewhere(three, 2, three.shards.join(2))
    assert same(whole_of(answers), stepped_by_calls())
    assert same(first.parameters(first.collect(number)), stepped_by_calls())


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_nobody_waits_for_a_worker_that_is_gone(how: str, three: Host) -> None:
    first, second = three.worker(0), three.worker(1)
    number = post(first, 1)
    if how == "leaves":
        second.client.close()
    else:
        for shard in (0, 1):
            second.client.drop(shard)
    eventually(lambda: pushed(three) == [{0}, {0}])
    push_elsewhere(three, 1, three.shards.join(1))
    answers = push_elsewhere(three, 2, three.shards.join(2))
    assert same(whole_of(answers), stepped_by_calls())
    assert same(first.parameters(first.collect(number)), stepped_by_calls())


def test_nobody_waits_for_long_for_a_worker_that_stands_still(
    three: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_shard, "_HOLD_S", 0.01)
    first, second = three.worker(0), three.worker(1)
    post(first, 1)
    eventually(lambda: pushed(three) == [{0}, {0}])
    post(second, 1)
    answers = push_elsewhere(three, 2, three.shards.join(2))
    assert same(whole_of(answers), stepped_by_calls())


def test_a_member_that_is_replaced_while_its_group_waits_has_the_others_pushed_again(
    three: Host,
) -> None:
    first, second = three.worker(0), three.worker(1)
    numbers = [post(first, 1), post(second, 1)]
    eventually(lambda: pushed(three) == [{0, 1}, {0, 1}])
    newer = three.worker(1)
    eventually(lambda: pushed(three) == [{0}, {0}])
    with pytest.raises(SupersededWorker):
        second.collect(numbers[1])
    number = post(newer, 1)
    answers = push_elsewhere(three, 2, three.shards.join(2))
    right = stepped_by_calls()
    assert same(whole_of(answers), right)
    assert same(first.parameters(first.collect(numbers[0])), right)
    assert same(newer.parameters(newer.collect(number)), right)


@pytest.mark.parametrize("beyond", [10, 500_000])
def test_a_groups_push_whose_line_breaks_goes_by_the_last_resort_and_counts_once(
    beyond: int,
) -> None:
    shards = Shards(IN_PAIRS)
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + beyond)
    host = Host(shards, {0: proxy.endpoint})
    workers = [host.worker(0), host.worker(1)]
    for round in (1, 2):
        answers = step(workers, round)
    assert same(workers[1].parameters(answers[1]), stepped_here(2, sum_group=2))
    assert any(isinstance(message, GroupPush) for _, message in host.carried)
    ledgers = [shard.host.shard.members.ledger for shard in shards.all]
    assert all(ledger.last(rank) == 2 for ledger in ledgers for rank in (0, 1))
    host.close()
    shards.close()
