"""Law 4: save at step k, restore on any number of shards and either backend, go on: bit-identical
to not having stopped.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from tests.configurations import configurations
from tests.models import bits, params, run, run_drifting


def undisturbed(steps: int, num_workers: int = 2, **config: Any) -> list[bytes]:
    with DistNadam(num_workers=num_workers, backend="local", **config).build(params()) as optimizer:
        run(optimizer, 0, steps, num_workers=num_workers)
        return bits(optimizer)


@pytest.mark.parametrize("examples", [8, pytest.param(25, marks=pytest.mark.nightly)])
def test_a_restored_run_ends_with_the_undisturbed_bits(
    examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @given(
        saved=st.integers(0, 4),
        before=st.integers(1, 20),
        after=st.integers(1, 20),
        sum_group=st.integers(1, 3),
        hyperparameters=configurations("dense/*", "half", "layers/0"),
    )
    @settings(max_examples=examples)
    def check(
        saved: int, before: int, after: int, sum_group: int, hyperparameters: dict[str, Any]
    ) -> None:
        root = tmp_path_factory.mktemp("run")
        config = {"num_workers": 3, "sum_group": sum_group} | hyperparameters
        with DistNadam(num_shards=before, backend="local", **config).build(params()) as optimizer:
            run(optimizer, 0, saved, num_workers=3)
            checkpoint = optimizer.save(root)
            at_save = bits(optimizer)
        with DistNadam.restore(checkpoint, num_shards=after, backend="local") as optimizer:
            assert config.items() <= optimizer.get_config().items()
            assert (optimizer.round, optimizer.iterations) == (saved, saved)
            assert bits(optimizer) == at_save
            run(optimizer, saved, 5, num_workers=3)
            assert bits(optimizer) == undisturbed(5, **config)

    check()


MOVED: dict[str, Any] = {"clipnorm": 0.5, "clocks": "tensor"}


@cache
def undisturbed_of_rounded(steps: int) -> tuple[bytes, ...]:
    with DistNadam(num_workers=2, backend="local", pull_dtype="bfloat16").build(
        params()
    ) as optimizer:
        run_drifting(optimizer, 0, steps)
        return tuple(bits(optimizer))


@pytest.mark.on_ray(slow=["ray-3-1"])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (7, 2)])
def test_a_restored_run_whose_workers_see_rounded_parameters_keeps_the_masters(
    before: int, after: int, backend: str, tmp_path: Path
) -> None:
    with DistNadam(num_shards=before, num_workers=2, backend="local", pull_dtype="bfloat16").build(
        params()
    ) as optimizer:
        run_drifting(optimizer, 0, 2)
        optimizer.save(tmp_path)
        assert tuple(bits(optimizer)) == undisturbed_of_rounded(2)
    with DistNadam.restore(tmp_path, num_shards=after, backend=backend) as optimizer:
        assert optimizer.get_config()["pull_dtype"] == "bfloat16"
        assert tuple(bits(optimizer)) == undisturbed_of_rounded(2)
        run_drifting(optimizer, 2, 3)
        optimizer.reshard(before)
        run_drifting(optimizer, 3, 4)
        assert tuple(bits(optimizer)) == undisturbed_of_rounded(4)


_MOVES = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 3)),
    st.tuples(st.just("save"), st.booleans()),
    st.tuples(st.just("restore"), st.integers(1, 24)),
    st.tuples(st.just("reshard"), st.integers(1, 24)),
    st.tuples(st.just("balance"), st.integers(0, 99)),
)


@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.nightly)])
def test_any_sequence_of_saves_restores_and_reshards_keeps_the_undisturbed_bits(
    examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A restore goes back to the newest checkpoint, whatever was trained since; the rounds after it
    are trained again.
    """

    @given(moves=st.lists(_MOVES, min_size=1, max_size=12))
    @settings(max_examples=examples)
    def check(moves: list[tuple[str, int]]) -> None:
        root = tmp_path_factory.mktemp("run")
        optimizer = DistNadam(num_shards=3, num_workers=2, backend="local", **MOVED).build(params())
        optimizer.save(root)
        newest = 0
        try:
            for move, how in [*moves, ("restore", 2), ("train", 1)]:
                if move == "train":
                    run(optimizer, optimizer.round, optimizer.round + how)
                elif move == "save":
                    optimizer.save(root, wait=bool(how))
                    newest = optimizer.round
                elif move == "reshard":
                    optimizer.reshard(how)
                elif move == "balance":
                    count = len(optimizer.shards.backend.transport.cuts)
                    optimizer.reshard(count, shares=[*range(how, how + count - 1), 1])
                else:
                    optimizer.close()
                    optimizer = DistNadam.restore(root, num_shards=how, backend="local")
                    assert optimizer.round == newest
                assert tuple(bits(optimizer)) == _undisturbed_at(optimizer.round)
        finally:
            optimizer.close()

    check()


@cache
def _undisturbed_at(steps: int) -> tuple[bytes, ...]:
    return tuple(undisturbed(steps, **MOVED))


@pytest.mark.slow
def test_a_run_moves_between_backends(tmp_path: Path, ray_cluster: None) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        run(optimizer, 0, 2)
        optimizer.save(tmp_path)
    for begin, num_shards, backend in ((2, 2, "ray"), (4, 3, "ray"), (6, 2, "local")):
        with DistNadam.restore(tmp_path, num_shards=num_shards, backend=backend) as optimizer:
            run(optimizer, begin, begin + 2)
            assert bits(optimizer) == undisturbed(begin + 2), f"after {backend} with {num_shards}"
            optimizer.save(tmp_path)


def test_training_goes_on_with_the_same_bits_after_a_save(backend: str, tmp_path: Path) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        run(optimizer, 0, 2)
        optimizer.save(tmp_path)
        run(optimizer, 2, 4)
        assert bits(optimizer) == undisturbed(4)
