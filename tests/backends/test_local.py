"""Resharding in one process: nothing is lost, and after one that fails the shards work on."""

import hashlib
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        assert optimizer.shards.backend.transport.num_shards == 1
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
        assert optimizer.shards.backend.transport.num_shards == 3
        assert bits(optimizer) == before
        assert optimizer.apply_gradients(small) == 2


def test_a_learning_rate_that_was_set_survives_a_reshard() -> None:
    with DistNadam(backend="local").build({"w": np.ones(5000, np.float32)}) as optimizer:
        optimizer.lr = 0.25
        optimizer.reshard(3)
        assert optimizer.lr == 0.25


if __name__ == "__main__":
    print(train(int(sys.argv[1])))
