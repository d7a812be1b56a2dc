"""Law 2: the same gradients give bit-identical params, m and v for every number of shards, backend,
kernel, transport and thread count.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

import ml_dtypes
import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam, Options
from tests.configurations import configurations
from tests.models import bits, drifting, gradients, leaves, params, run, run_drifting

CLIPS = [{}, {"clipnorm": 0.7}, {"global_clipnorm": 1.5, "clipvalue": 0.01}, {"clipvalue": 0.05}]
STEPS = 4
_reference: dict[str, list[bytes]] = {}


def reference(clip: dict[str, float]) -> list[bytes]:
    """The bits of one local shard with one thread."""
    key = repr(clip)
    if key not in _reference:
        with DistNadam(num_workers=2, backend="local", options=Options(threads=1), **clip).build(
            params()
        ) as optimizer:
            run(optimizer, 0, STEPS)
            _reference[key] = bits(optimizer)
    return _reference[key]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("kernel", ["numpy", "fused"])
def test_local_bits_do_not_depend_on_the_number_of_shards(
    num_shards: int, clip: dict[str, float], kernel: Any
) -> None:
    options = Options(threads=3, kernel=kernel)
    with DistNadam(
        num_shards=num_shards, num_workers=2, backend="local", options=options, **clip
    ).build(params()) as optimizer:
        run(optimizer, 0, STEPS)
        assert bits(optimizer) == reference(clip)


@settings(max_examples=40)
@given(
    config=configurations("dense/*", "half", "layers/0"),
    num_shards=st.integers(2, 9),
    kernel=st.sampled_from(["numpy", "fused"]),
    threads=st.integers(1, 3),
)
def test_no_configurations_bits_depend_on_shards_kernel_or_threads(
    config: dict[str, Any], num_shards: int, kernel: Any, threads: int
) -> None:
    found = []
    for shards, options in (
        (1, Options(kernel="numpy", threads=1)),
        (num_shards, Options(kernel=kernel, threads=threads)),
    ):
        with DistNadam(
            num_shards=shards, num_workers=2, backend="local", options=options, **config
        ).build(params()) as optimizer:
            run(optimizer, 0, 3, order=lambda _: (0, 1))
            found.append(bits(optimizer))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("num_shards", "clip", "kernel", "transport"),
    [
        pytest.param(1, 0, "numpy", "auto", marks=pytest.mark.nightly),
        pytest.param(2, 1, "fused", "auto", marks=pytest.mark.nightly),
        (2, 2, "fused", "objects"),
        (3, 2, "numpy", "mixed"),
        pytest.param(7, 3, "numpy", "objects", marks=pytest.mark.nightly),
        pytest.param(7, 1, "fused", "mixed", marks=pytest.mark.nightly),
        pytest.param(16, 2, "fused", "auto", marks=pytest.mark.slow),
    ],
)
def test_ray_bits_are_the_local_ones(
    num_shards: int, clip: int, kernel: Any, transport: Any, ray_cluster: None
) -> None:
    mixed = transport == "mixed"
    options = Options(
        threads=2 if num_shards == 3 else None,
        kernel=kernel,
        transport="auto" if mixed else transport,
    )
    with DistNadam(
        num_shards=num_shards, num_workers=2, backend="ray", options=options, **CLIPS[clip]
    ).build(params()) as optimizer:
        if mixed:  # as if every other shard were on another node
            transport: Any = optimizer.shards.backend.transport
            shard_map = transport.shard_map
            moved = [
                dataclasses.replace(
                    shard, address=dataclasses.replace(shard.address, node="elsewhere")
                )
                if shard.index % 2 == 0
                else shard
                for shard in shard_map.shards
            ]
            transport.shard_map = dataclasses.replace(shard_map, shards=tuple(moved))
        run(optimizer, 0, STEPS)
        assert bits(optimizer) == reference(CLIPS[clip])


RANKS = 5
"""Of the runs in groups: groups of 2 leave a lone rank, groups of 3 a smaller group."""


def pushed(step: int, rank: int) -> dict[str, Any]:
    """Gradients whose sum in another order has other bits."""
    rng = np.random.default_rng([step, rank])
    return {
        "narrow": rng.standard_normal(4000).astype(np.float32) * np.float32(10.0**rank),
        "wide": rng.standard_normal(3000) * 10.0**-rank,
    }


def averaged(step: int, sum_group: int, ranks: Sequence[int]) -> dict[str, Any]:
    """The mean as the README's law says it, written out plainly."""
    sums: dict[int, Any] = {}
    for rank in sorted(ranks):
        mine, group = pushed(step, rank), rank // sum_group
        known = sums.get(group)
        sums[group] = mine if known is None else {key: known[key] + mine[key] for key in mine}
    total = reduce(lambda a, b: {key: a[key] + b[key] for key in a}, sums.values())
    return {key: value / value.dtype.type(len(ranks)) for key, value in total.items()}


@cache
def stepped_with_means(sum_group: int, clip: int) -> list[bytes]:
    with DistNadam(backend="local", **CLIPS[clip]).build(pushed(99, 0)) as optimizer:
        for step in range(STEPS):
            optimizer.apply_gradients(averaged(step, sum_group, range(RANKS)))
        return bits(optimizer)


def stepped_in_groups(sum_group: int, clip: int, backend: str, **settings: Any) -> list[bytes]:
    with DistNadam(
        num_workers=RANKS, sum_group=sum_group, backend=backend, **CLIPS[clip], **settings
    ).build(pushed(99, 0)) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(RANKS)]
        for step in range(STEPS):
            tickets = [worker.push(pushed(step, worker.rank)) for worker in workers[::-1]]
            assert [ticket.result() for ticket in tickets] == [step + 1] * RANKS
        return bits(optimizer)


@pytest.mark.parametrize("sum_group", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("clip", [0, 2])
@pytest.mark.parametrize("kernel", ["numpy", "fused"])
def test_the_bits_depend_on_how_ranks_are_summed_in_groups_and_on_nothing_else(
    sum_group: int, num_shards: int, clip: int, kernel: Any
) -> None:
    options = Options(threads=2, kernel=kernel)
    found = stepped_in_groups(sum_group, clip, "local", num_shards=num_shards, options=options)
    assert found == stepped_with_means(sum_group, clip)
    in_order = sum_group == 1 or sum_group >= RANKS - 1  # a lone rank is added last
    assert (found == stepped_with_means(1, clip)) == in_order


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "objects"])
def test_groups_have_the_local_bits_over_ray(transport: Any, ray_cluster: None) -> None:
    options = Options(transport=transport)
    found = stepped_in_groups(2, 2, "ray", num_shards=2, options=options)
    assert found == stepped_with_means(2, 2)


def masters(optimizer: DistNadam) -> list[Any]:
    """Each tensor's parameters in the dtype of their space."""
    flat = optimizer.shards.read(("params",))[1]["params"]
    return optimizer.shards.layout.views(flat)


def rounded(master: Any) -> Any:
    return master.astype(ml_dtypes.bfloat16) if master.dtype == np.float32 else master


@cache
def stepped_on_rounded() -> list[bytes]:
    """The bits where the caller rounds the masters, computes all gradients from that, and averages
    them.
    """
    with DistNadam(backend="local", clipnorm=0.7).build(params()) as optimizer:
        unflatten = optimizer.shards.layout.unflatten
        for step in range(STEPS):
            seen = unflatten(map(rounded, masters(optimizer)))
            first, second = (leaves(drifting(step, rank, seen)) for rank in range(2))
            means = [
                (a.astype(space.dtype) + b.astype(space.dtype)) / space.dtype.type(2)
                for a, b, space in zip(first, second, masters(optimizer), strict=True)
            ]
            optimizer.apply_gradients(unflatten(means))
        return bits(optimizer)


@pytest.mark.on_ray(slow=["ray-2-fused"])
@pytest.mark.parametrize(
    ("num_shards", "kernel"), [(1, "numpy"), (1, "fused"), (2, "fused"), (7, "numpy")]
)
def test_workers_that_see_rounded_parameters_lead_to_the_bits_of_rounding_the_master(
    num_shards: int, kernel: Any, backend: str
) -> None:
    options = Options(threads=2, kernel=kernel)
    with DistNadam(
        num_shards=num_shards,
        num_workers=2,
        backend=backend,
        options=options,
        clipnorm=0.7,
        pull_dtype="bfloat16",
    ).build(params()) as optimizer:
        run_drifting(optimizer, 0, STEPS)
        with optimizer.worker(0) as worker:
            seen = [np.asarray(leaf).tobytes() for leaf in leaves(worker.pull())]
        assert seen == [rounded(master).tobytes() for master in masters(optimizer)]
        assert bits(optimizer) == stepped_on_rounded()


def in_half_precision(step: int, rank: int, dtype: Any) -> Any:
    tree = gradients(step, rank)
    narrow = [
        np.clip(leaf, -100, 100).astype(dtype if leaf.dtype != np.float64 else np.float64)
        for leaf in map(np.asarray, leaves(tree))
    ]
    return optree.tree_unflatten(optree.tree_structure(tree), narrow)


@pytest.mark.on_ray("ray-numpy-bfloat16-1", slow=["ray-fused-float16-2"])
@pytest.mark.parametrize("sum_group", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("kernel", ["numpy", "fused"])
def test_gradients_in_half_precision_count_as_if_they_had_been_widened(
    dtype: Any, kernel: Any, sum_group: int, backend: str
) -> None:
    ranks = 4
    ends = []
    for widen in (False, True):
        with DistNadam(
            num_shards=2,
            num_workers=ranks,
            sum_group=sum_group,
            backend="local" if widen else backend,
            options=Options(kernel=kernel),
            clipnorm=1.0,
        ).build(params()) as optimizer:
            workers = [optimizer.worker(rank) for rank in range(ranks)]
            for step in range(3):
                trees = [in_half_precision(step, rank, dtype) for rank in range(ranks)]
                if widen:
                    trees = [
                        optree.tree_map(
                            lambda leaf: leaf.astype(np.result_type(leaf, np.float32)), tree
                        )
                        for tree in trees
                    ]
                tickets = [worker.push(tree) for worker, tree in zip(workers, trees, strict=True)]
                assert [ticket.result() for ticket in tickets] == [step + 1] * ranks
            assert all(
                worker._buffer.flat["float32"].dtype == (np.float32 if widen else dtype)
                for worker in workers
            )
            ends.append(bits(optimizer))
    assert ends[0] == ends[1]


def test_a_tensor_is_really_cut_in_the_middle() -> None:
    with DistNadam(num_shards=7, backend="local").build(params()) as optimizer:
        layout = optimizer.shards.layout
        inner = {begin for ranges in layout.cuts(7) for space, (begin, _) in ranges.items()}
        assert any(t.begin < begin < t.end for t in layout.tensors for begin in inner)
