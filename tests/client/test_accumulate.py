"""Gradient accumulation: sums in the worker, one division, and ranks that count alike."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import ml_dtypes
import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam, Options, Worker
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.errors import (
    LifecycleError,
    NonFiniteGradient,
    RanksDisagree,
    Rewound,
    StaleEpoch,
    StructureError,
)
from distnadam.tensors.arrays import empty_flat
from distnadam.tensors.layout import Layout
from tests.models import bits, gradients, leaves, params

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
ONES = {"w": np.ones(3, np.float32)}


def small(**given: Any) -> DistNadam:
    return DistNadam(backend="local", **given).build({"w": np.ones(3, np.float32)})


def mean_of(trees: list[Any]) -> Any:
    """The sum in each tensor's space, in order, divided once."""

    def mean(*given: Any) -> Any:
        space = np.float64 if np.asarray(given[0]).dtype == np.float64 else np.float32
        total = np.asarray(given[0]).astype(space)
        for each in given[1:]:
            total = total + np.asarray(each).astype(space)
        return total / space(len(given))

    return optree.tree_map(mean, *trees)


@pytest.mark.on_ray(slow=["ray-objects-2"])
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("transport", ["auto", "objects"])
def test_a_round_of_micro_batches_is_a_round_of_their_mean(
    transport: Any, num_shards: int, backend: str
) -> None:
    """Also one that is shorter than those before."""
    counts = [3, 1, 4, 2]
    with DistNadam(
        num_shards=num_shards,
        num_workers=2,
        backend=backend,
        global_clipnorm=2.0,
        options=Options(transport=transport),
    ).build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        for number, count in enumerate(counts):
            for micro in range(count):
                for worker in workers:
                    worker.accumulate(gradients(10 * number + micro, worker.rank))
            for ticket in [worker.push() for worker in workers]:
                ticket.result()
        got = bits(optimizer)
    with DistNadam(num_workers=2, backend="local", global_clipnorm=2.0).build(
        params()
    ) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        for number, count in enumerate(counts):
            means = [
                mean_of([gradients(10 * number + micro, rank) for micro in range(count)])
                for rank in range(2)
            ]
            for ticket in [w.push(means[w.rank]) for w in workers]:
                ticket.result()
        assert bits(optimizer) == got


@given(dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_sums_are_in_the_spaces_dtype_whatever_comes(dtypes: list[Any], seed: int) -> None:
    layout = Layout.of(
        {"a": np.zeros(70_000, np.float32), "b": np.zeros(5), "c": np.zeros((), np.float32)}
    )
    buffer = GradientBuffer(layout, "worker 7", empty_flat(layout.sizes))
    rng = np.random.default_rng(seed)
    trees = [
        {
            "a": (100 * rng.standard_normal(70_000)).astype(dtype),
            "b": rng.standard_normal(5).astype(dtype),
            "c": np.asarray(rng.standard_normal()).astype(dtype),
        }
        for dtype in dtypes
    ]
    kept = [optree.tree_map(np.copy, tree) for tree in trees]
    for tree in trees:
        buffer.accumulate(tree)
    assert buffer.micro_steps == len(trees)
    assert buffer.finish() is None and buffer.micro_steps == 0
    for name, space in (("a", np.float32), ("b", np.float64), ("c", np.float32)):
        total = kept[0][name].astype(space)
        for tree in kept[1:]:
            total = total + tree[name].astype(space)
        expected = (total / space(len(trees))).reshape(-1)
        tensor = next(t for t in layout.tensors if t.path == name)
        found = buffer.flat[tensor.space][tensor.begin : tensor.end]
        assert found.dtype == space and found.tobytes() == expected.tobytes()
    assert all(
        one.tobytes() == other.tobytes()
        for tree, copy in zip(trees, kept, strict=True)
        for one, other in zip(leaves(tree), leaves(copy), strict=True)
    ), "what was given is as it was"


def test_only_the_mean_is_judged() -> None:
    with small() as optimizer, optimizer.worker(0) as worker:
        for value in (3e19, -3e19):  # whose squares overflow
            worker.accumulate({"w": np.full(3, value, np.float32)})
        assert worker.push().result() == 1
        for value in (3e38, 3e38):  # whose sum does
            worker.accumulate({"w": np.full(3, value, np.float32)})
        with pytest.raises(NonFiniteGradient, match="worker 0: gradient 'w' is not finite"):
            worker.step()
        worker.accumulate(ONES)
        assert worker.push().result() == 2, "the next round is free of it"


@pytest.mark.on_ray(slow=["ray-2"])
@pytest.mark.parametrize("sum_group", [1, 2])
def test_counts_that_differ_are_refused_for_all_in_rank_order_and_the_next_round_goes_on(
    sum_group: int, backend: str
) -> None:
    with DistNadam(num_shards=2, num_workers=3, sum_group=sum_group, backend=backend).build(
        params()
    ) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(3)]
        before = bits(optimizer)
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            for rank, count in enumerate((2, 3, 2)):
                for micro in range(count):
                    workers[rank].accumulate(gradients(micro, rank))
            tickets = [workers[rank].push() for rank in order]
            for ticket in tickets:
                with pytest.raises(
                    RanksDisagree,
                    match="no shard has moved: micro_steps must be equal on all ranks: rank 0 has "
                    "2, rank 1 has 3, rank 2 has 2",
                ):
                    ticket.result()
        assert bits(optimizer) == before
        assert (optimizer.round, optimizer.skipped) == (3, 3)
        for worker in workers:
            worker.accumulate(gradients(0, worker.rank))
        mixed = [workers[0].push(), workers[1].push(), workers[2].push()]
        assert [ticket.result() for ticket in mixed] == [1, 1, 1]
        # one micro-batch is no other than a push by itself
        workers[0].accumulate(gradients(1, 0))
        alike = [workers[0].push(), *(w.push(gradients(1, w.rank)) for w in workers[1:])]
        assert [ticket.result() for ticket in alike] == [2, 2, 2]


OTHERWISE: dict[str, Callable[[Worker], object]] = {
    "a whole gradient was given": lambda worker: worker.push(ONES),
    "a tensor was pushed": lambda worker: worker.push_tensor("w", ONES["w"]),
    "views were asked for": lambda worker: worker.gradients(),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_round_of_micro_batches_takes_nothing_else(what: str) -> None:
    with small() as optimizer, optimizer.worker(0) as worker:
        worker.accumulate(ONES)
        with pytest.raises(
            LifecycleError,
            match=rf"worker 0: {what}, and micro-batches were accumulated for this round \(1\)",
        ):
            OTHERWISE[what](worker)
        worker.accumulate(ONES)
        assert worker.push().result() == 1, "the sum is as it was"
        worker.accumulate(ONES)
        worker.discard()
        with pytest.raises(LifecycleError, match="give gradients"):
            worker.step()
        OTHERWISE[what](worker)


def test_a_round_that_is_written_otherwise_takes_no_micro_batches() -> None:
    with small() as optimizer, optimizer.worker(0) as worker:
        worker.push_tensor("w", ONES["w"])
        with pytest.raises(LifecycleError, match="tensors were pushed for it"):
            worker.accumulate(ONES)
        assert worker.push().result() == 1
        worker.gradients()["w"][:] = 1.0
        assert worker.push().result() == 2
        with pytest.raises(LifecycleError, match=r"gradients\(\) has given views"):
            worker.accumulate(ONES)


def test_a_micro_batch_that_is_refused_leaves_the_sum_as_it_was() -> None:
    with DistNadam(backend="local").build(params()) as optimizer, optimizer.worker(0) as worker:
        worker.accumulate(gradients(0, 0))
        wrong = gradients(1, 0)
        wrong["layers"][0] = wrong["layers"][0][:-1]
        with pytest.raises(StructureError, match="layers/0"):
            worker.accumulate(wrong)
        worker.accumulate(gradients(2, 0))
        worker.step()
        got = bits(optimizer)
    with DistNadam(backend="local").build(params()) as optimizer, optimizer.worker(0) as worker:
        worker.step(mean_of([gradients(0, 0), gradients(2, 0)]))
        assert bits(optimizer) == got


def test_a_sum_of_other_parameters_is_dropped_by_name() -> None:
    with small() as optimizer, optimizer.worker(0) as worker:
        worker.pull()
        worker.accumulate(ONES)
        optimizer.set_params({"w": np.zeros(3, np.float32)})
        worker.accumulate(ONES)
        with pytest.raises(StaleEpoch):
            worker.step()
        worker.accumulate(ONES)
        optimizer.set_params({"w": np.ones(3, np.float32)})
        worker.pull()
        with pytest.raises(
            StaleEpoch, match=r"worker 0: 1 micro-batches were accumulated .* they were dropped"
        ) as raised:
            worker.accumulate(ONES)
        assert raised.value.step == 0 and not isinstance(raised.value, Rewound)
        with pytest.raises(LifecycleError, match="give gradients"):
            worker.push()
        worker.accumulate(ONES)
        worker.accumulate(ONES)
        assert worker.push().result() == 1


def test_a_rank_that_is_taken_over_begins_its_sum_anew() -> None:
    ends = []
    for dies in (True, False):
        with small(num_workers=2) as optimizer:
            first, other = optimizer.worker(0), optimizer.worker(1)
            if dies:
                first.accumulate({"w": np.full(3, 7.0, np.float32)})
                first = optimizer.worker(0)
            for value in (1.0, 2.0):
                first.accumulate({"w": np.full(3, value, np.float32)})
                other.accumulate(ONES)
            tickets = [first.push(), other.push()]
            assert [ticket.result() for ticket in tickets] == [1, 1]
            ends.append(bits(optimizer))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("then", ["push", "accumulate"])
def test_a_sum_is_not_pushed_where_the_shards_stand_elsewhere_though_the_worker_has_looked(
    then: str,
) -> None:
    with small() as optimizer:
        worker = optimizer.worker(0)
        for change in (
            lambda: optimizer.set_params({"w": np.zeros(3, np.float32)}),
            lambda: optimizer.apply_gradients(ONES),
        ):
            worker.pull()
            worker.accumulate(ONES)
            change()
            worker.pull()
            before = bits(optimizer)
            with pytest.raises(StaleEpoch, match="1 micro-batches were accumulated after round"):
                worker.push() if then == "push" else worker.accumulate(ONES)
            assert bits(optimizer) == before


def test_a_push_in_flight_is_decided_before_a_micro_batch_takes_its_memory() -> None:
    with small(num_workers=2) as optimizer:
        one, other = (optimizer.worker(rank) for rank in range(2))
        ticket = one.push(ONES)
        waits = Thread(target=one.accumulate, args=({"w": np.full(3, 9, np.float32)},))
        waits.start()
        other.push(ONES).result()
        waits.join()
        assert ticket.result() == 1
        found = optimizer.get_params()["w"]
    with small() as alone:
        alone.apply_gradients(ONES)
        assert alone.get_params()["w"].tobytes() == found.tobytes()


def test_a_sum_after_a_push_in_half_precision_is_in_float32() -> None:
    with small() as optimizer, small() as other:
        worker = optimizer.worker(0)
        worker.push({"w": np.ones(3, np.float16)}).result()
        for value in (2048.0, 1.0):
            worker.accumulate({"w": np.full(3, value, np.float32)})
        worker.push().result()
        other.apply_gradients(ONES)
        other.apply_gradients({"w": np.full(3, 1024.5, np.float32)})
        assert bits(optimizer) == bits(other)
