"""A direct step of a local optimizer whose parameters nobody has seen writes them where they are;
its bits are those of a step into the other buffer, and nobody's copy or view changes.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import ConfigError

START = {"b": np.linspace(-1, 1, 7), "w": np.linspace(-1, 1, 70_000, dtype=np.float32)}


def gradient(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {k: rng.standard_normal(v.shape).astype(v.dtype) for k, v in START.items()}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in optree.tree_leaves(tree)]


def active(optimizer: DistNadam) -> list[int]:
    return [host.shard.state.active for host in optimizer.shards.backend.transport.hosts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"clipnorm": 0.5}, {"clipvalue": 0.1}, {"pull_dtype": "bfloat16"}], ids=str
)
def test_the_bits_are_those_of_two_buffers(
    kernel: str, num_shards: int, settings: dict[str, Any]
) -> None:
    if kernel == "fused":
        pytest.importorskip("llvmlite")
    options = Options(kernel=kernel, threads=2)
    made = {"num_shards": num_shards, "backend": "local", "options": options, **settings}
    with (
        DistNadam(**made).build(START) as in_place,
        DistNadam(**made).build(START) as seen,
    ):
        seen.worker(0).pull()
        for step in range(5):
            for optimizer in (in_place, seen):
                optimizer.apply_gradients(gradient(step))
        assert bits(in_place.get_weights()) == bits(seen.get_weights())
        assert bits(in_place.get_params()) == bits(seen.get_params())
        assert active(seen) == [1] * num_shards, "five swaps"
        rounds = [1 if "pull_dtype" in settings else 0] * num_shards
        assert active(in_place) == rounds, "none, but where workers see parameters rounded"


def test_a_view_that_a_worker_had_stays_as_it_was_until_the_step_after_the_next() -> None:
    with DistNadam(backend="local").build(START) as optimizer:
        optimizer.apply_gradients(gradient(0))
        with optimizer.worker(0) as worker:
            view = worker.pull()
        before = bits(view)
        optimizer.apply_gradients(gradient(1))
        assert bits(view) == before and bits(optimizer.get_params()) != before


def test_what_was_read_is_a_copy() -> None:
    with DistNadam(backend="local").build(START) as optimizer:
        optimizer.apply_gradients(gradient(0))
        params, weights = optimizer.get_params(), optimizer.get_weights()
        before = bits(params), bits(weights)
        optimizer.apply_gradients(gradient(1))
        assert (bits(params), bits(weights)) == before


def test_a_save_behind_the_training_has_the_parameters_of_its_round(tmp_path: Path) -> None:
    with DistNadam(backend="local").build(START) as optimizer:
        optimizer.apply_gradients(gradient(0))
        expected = bits(optimizer.get_weights())
        handle = optimizer.save(tmp_path, wait=False)
        for step in range(1, 5):
            optimizer.apply_gradients(gradient(step))
        path = handle.result()
        with DistNadam.restore(path, backend="local") as restored:
            assert bits(restored.get_weights()) == expected


def test_a_schedule_that_raises_leaves_the_parameters_untouched() -> None:
    def schedule(step: int) -> float:
        if step == 1:
            raise ValueError("no rate")
        return 0.01

    with DistNadam(lr=schedule, backend="local").build(START) as optimizer:
        optimizer.apply_gradients(gradient(0))
        before = bits(optimizer.get_weights())
        with pytest.raises(ConfigError, match="no rate"):
            optimizer.apply_gradients(gradient(1))
        assert bits(optimizer.get_weights()) == before


def test_a_worker_that_is_made_in_the_middle_of_a_step_sees_the_parameters_after_it() -> None:
    pulled: list[dict[str, Any]] = []
    joined: list[threading.Thread] = []

    def pull() -> None:
        pulled.append(optimizer.worker(0).pull())

    def schedule(step: int) -> float:
        if step == 2:
            joined.append(threading.Thread(target=pull))
            joined[0].start()
            joined[0].join(0.3)
            assert joined[0].is_alive(), "it waits for the step"
        return 0.01

    with DistNadam(lr=schedule, backend="local").build(START) as optimizer:
        for step in range(3):
            optimizer.apply_gradients(gradient(step))
        joined[0].join()
        assert bits(pulled[0]) == bits(optimizer.get_params())
        before = bits(pulled[0])
        optimizer.apply_gradients(gradient(3))
        assert bits(pulled[0]) == before
