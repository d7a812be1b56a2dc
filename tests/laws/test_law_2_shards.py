"""Law 2: the same gradients give bit-identical params, m and v for every number of shards, backend,
kernel, transport and thread count.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import optree
import pytest

from distnadam import DistNadam, Options
from tests.models import bits, gradients, leaves, params, run

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


@pytest.mark.parametrize(
    ("num_shards", "clip", "kernel", "transport"),
    [
        (1, 0, "numpy", "auto"),
        (2, 1, "fused", "auto"),
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


def in_half_precision(step: int, rank: int, dtype: Any) -> Any:
    tree = gradients(step, rank)
    narrow = [
        np.clip(leaf, -100, 100).astype(dtype if leaf.dtype != np.float64 else np.float64)
        for leaf in map(np.asarray, leaves(tree))
    ]
    return optree.tree_unflatten(optree.tree_structure(tree), narrow)


@pytest.mark.on_ray("ray-numpy-bfloat16", slow=["ray-fused-float16"])
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("kernel", ["numpy", "fused"])
def test_gradients_in_half_precision_count_as_if_they_had_been_widened(
    dtype: Any, kernel: Any, backend: str
) -> None:
    ends = []
    for widen in (False, True):
        with DistNadam(
            num_shards=2,
            num_workers=2,
            backend="local" if widen else backend,
            options=Options(kernel=kernel),
            clipnorm=1.0,
        ).build(params()) as optimizer:
            workers = [optimizer.worker(rank) for rank in range(2)]
            for step in range(3):
                trees = [in_half_precision(step, rank, dtype) for rank in range(2)]
                if widen:
                    trees = [
                        optree.tree_map(
                            lambda leaf: leaf.astype(np.result_type(leaf, np.float32)), tree
                        )
                        for tree in trees
                    ]
                tickets = [worker.push(tree) for worker, tree in zip(workers, trees, strict=True)]
                assert [ticket.result() for ticket in tickets] == [step + 1] * 2
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
