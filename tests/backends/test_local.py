"""Resharding in one process: nothing is lost, and after one that fails the shards work on."""

import ctypes
import hashlib
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from typing_extensions import override

from distnadam import DistNadam, Options
from distnadam.backends.local import LocalProcesses
from distnadam.errors import OutOfMemory
from distnadam.protocol.supervisor_messages import Retire
from distnadam.supervision.process_manager import ShardProcess
from tests.models import bits

SIZE = 4_000_000
START = {"w": np.zeros(SIZE, np.float32)}


def gradient(number: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)}


def train(memory_bytes: int | None) -> str:
    """Step, reshard with so much memory left, step again; return a digest of the state."""
    options = Options(step_timeout_s=10.0)
    with DistNadam(backend="local", options=options).build(START) as optimizer:
        optimizer.apply_gradients(gradient(0))
        if memory_bytes is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            before = resource.getrlimit(resource.RLIMIT_AS)
            limit = pages * resource.getpagesize() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
            try:
                with pytest.raises(OutOfMemory):
                    optimizer.reshard(2)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
        assert len(optimizer.shards.backend.transport.cuts) == 1
        assert optimizer.apply_gradients(gradient(1)) == 2
        return hashlib.sha256(b"".join(bits(optimizer))).hexdigest()


# New shards ask 4 bytes per element for m and v each; then a copy of their state asks 12.
@pytest.mark.parametrize("memory_bytes", [5 * SIZE, 13 * SIZE], ids=["starting", "moving"])
def test_a_reshard_without_memory_leaves_the_present_shards_at_work(memory_bytes: int) -> None:
    command = [sys.executable, "-m", "tests.backends.test_local", str(memory_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == train(None)


class Interrupted(LocalProcesses):
    """Hosts of which some have retired when the user interrupts."""

    retired = 0
    interrupts = 1

    @override
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        if self.interrupts and any(isinstance(each, Retire) for each in messages.values()):
            self.interrupts -= 1
            first = {index: messages[index] for index in range(self.retired)}
            super().ask(targets, first, timeout_s)
            raise KeyboardInterrupt
        return super().ask(targets, messages, timeout_s)


@pytest.mark.parametrize("retired", [0, 1, 2])
def test_a_reshard_that_is_interrupted_once_the_state_moved_is_completed(
    retired: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupted, "retired", retired)
    small = {"w": np.ones(5000, np.float32)}
    with DistNadam(backend="local", num_shards=2).build(small) as optimizer:
        optimizer.apply_gradients(small)
        before = bits(optimizer)
        monkeypatch.setattr("distnadam.backends.local.LocalProcesses", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.reshard(3)
        assert len(optimizer.shards.backend.transport.cuts) == 3
        assert bits(optimizer) == before
        assert optimizer.apply_gradients(small) == 2


def test_a_learning_rate_that_was_set_survives_a_reshard() -> None:
    with DistNadam(backend="local").build({"w": np.ones(5000, np.float32)}) as optimizer:
        optimizer.lr = 0.25
        optimizer.reshard(3)
        assert optimizer.lr == 0.25


if __name__ == "__main__":
    print(train(int(sys.argv[1])))


class Twins:
    """Two optimizers that step alike: `shared` has its parameters where others may write them."""

    def __init__(self, clipnorm: float | None) -> None:
        self._rng = np.random.default_rng(0)
        self.both = [
            DistNadam(backend="local", num_shards=2, global_clipnorm=clipnorm).build(
                self._tree(np.random.default_rng(1))
            )
            for _ in range(2)
        ]
        self.plain, self.shared = self.both
        assert self.shared.shards.backend.transport.share_parameters()
        self.workers = [optimizer.worker(0) for optimizer in self.both]

    def _tree(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        shape = 300, 7
        wide, narrow = rng.standard_normal(shape), rng.standard_normal(shape)
        return {"a": wide, "w": narrow.astype(np.float32)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for optimizer in self.both:
            optimizer.close()

    def pull(self) -> dict[str, np.ndarray]:
        pulled: list[dict[str, np.ndarray]] = [worker.pull() for worker in self.workers]
        return pulled[1]

    def step(self, places: Mapping[str, np.ndarray]) -> None:
        """Step both, and see that the shared parameters are, and lie, as they should."""
        gradients = self._tree(self._rng)
        for worker in self.workers:
            worker.step(gradients)
        assert bits(self.plain) == bits(self.shared)
        params = self.plain.get_params()
        for name, array in self.workers[1].parameters().items():
            assert array.ctypes.data == places[name].ctypes.data
            assert np.array_equal(array, params[name])


@pytest.mark.parametrize("clipnorm", [None, 1.0])
def test_parameters_that_are_shared_stay_where_they_lie_whoever_writes_them(
    clipnorm: float | None,
) -> None:
    with Twins(clipnorm) as twins:
        places = twins.pull()
        for cut in (2, 3, 1):
            for optimizer in twins.both:
                optimizer.reshard(cut)
            twins.pull()
            twins.step(places)
            twins.step(places)
        twins.plain.set_params({k: v * 0.5 for k, v in twins.plain.get_params().items()})
        for array in places.values():  # without a word to the shards
            half = array * 0.5
            ctypes.memmove(array.ctypes.data, half.ctypes.data, array.nbytes)
        twins.pull()
        twins.step(places)


@pytest.mark.parametrize("clipnorm", [None, 1.0])
def test_whoever_has_shared_parameters_keeps_them_once_the_shards_have_moved(
    clipnorm: float | None,
) -> None:
    with Twins(clipnorm) as twins:
        left = twins.pull()
        twins.step(left)
        before = {name: array.copy() for name, array in left.items()}
        twins.shared.shards.backend.transport.move_parameters()
        places = twins.pull()
        assert all(places[name].ctypes.data != left[name].ctypes.data for name in left)
        for _ in range(3):
            twins.step(places)
        for optimizer in twins.both:
            optimizer.set_params(before)
        twins.pull()
        twins.step(places)
        assert all(np.array_equal(left[name], before[name]) for name in left)


def test_parameters_that_somebody_may_see_or_that_are_rounded_are_not_shared() -> None:
    ones = {"w": np.ones(30, np.float32)}
    with DistNadam(backend="local").build(ones) as optimizer, optimizer.worker(0) as worker:
        worker.pull()
        assert not optimizer.shards.backend.transport.share_parameters()
    with DistNadam(backend="local", pull_dtype="bfloat16").build(ones) as optimizer:
        assert not optimizer.shards.backend.transport.share_parameters()
