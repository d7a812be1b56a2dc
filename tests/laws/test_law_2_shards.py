"""Law 2: the same gradients give bit-identical params, m and v for every number of shards, backend and thread count."""

import pytest

from distnadam import DistNadam, Options
from tests.models import bits, params, run

CLIPS = [{}, {"clipnorm": 0.7}, {"global_clipnorm": 1.5, "clipvalue": 0.01}, {"clipvalue": 0.05}]
STEPS = 4
_reference: dict[str, list[bytes]] = {}


def reference(clip: dict[str, float]) -> list[bytes]:
    """The bits of one local shard with one thread."""
    key = repr(clip)
    if key not in _reference:
        with DistNadam(num_workers=2, backend="local", options=Options(threads=1), **clip).build(params()) as optimizer:
            run(optimizer, 0, STEPS)
            _reference[key] = bits(optimizer)
    return _reference[key]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_local_bits_do_not_depend_on_the_number_of_shards(num_shards: int, clip: dict[str, float]) -> None:
    with DistNadam(num_shards=num_shards, num_workers=2, backend="local", options=Options(threads=3), **clip).build(params()) as optimizer:
        run(optimizer, 0, STEPS)
        assert bits(optimizer) == reference(clip)


@pytest.mark.parametrize(("num_shards", "clip"), [(1, 0), (2, 1), (3, 2), (7, 3), (16, 2)])
def test_ray_bits_are_the_local_ones_for_every_number_of_shards(num_shards: int, clip: int, ray_cluster: None) -> None:
    options = Options(threads=2 if num_shards == 3 else None)
    with DistNadam(num_shards=num_shards, num_workers=2, backend="ray", options=options, **CLIPS[clip]).build(params()) as optimizer:
        run(optimizer, 0, STEPS)
        assert bits(optimizer) == reference(CLIPS[clip])


def test_a_tensor_is_really_cut_in_the_middle() -> None:
    with DistNadam(num_shards=7, backend="local").build(params()) as optimizer:
        layout = optimizer._running().layout
        inner = {begin for ranges in layout.cuts(7) for space, (begin, _) in ranges.items()}
        assert any(t.begin < begin < t.end for t in layout.tensors for begin in inner)
