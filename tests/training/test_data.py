"""Batches of a DataLoader and of a Ray dataset: each sample once an epoch, also where a run goes on
after a stop, a recovery, and on another number of workers.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import fit
from distnadam.errors import ConfigError
from distnadam.training.data import LoaderBatches

pytestmark = pytest.mark.slow
SEEN: dict[tuple[int, int, int], list[int]] = {}
"""By step, rank and world size: the samples of the last batch that was asked for."""


class Counting:
    """Trains on numbers, of which it keeps those that it saw."""

    def __init__(self, make: Any, fails_at: int | None = None) -> None:
        self.make, self.fails_at = make, fails_at

    def init(self, seed: int) -> Any:
        self.batches = self.make(seed)
        return {"w": np.zeros(2, np.float32)}

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        batch = self.batches(step, rank, world_size)
        numbers = np.asarray(batch["id"] if isinstance(batch, dict) else batch[0])
        SEEN[step, rank, world_size] = [int(number) for number in numbers.reshape(-1)]
        if step == self.fails_at and rank == 1:
            self.fails_at = None
            raise ZeroDivisionError("the batch is bad")
        return numbers.astype(np.float32)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        return float(batch.mean()), {"w": np.full(2, batch.mean(), np.float32)}

    def evaluate(self, params: Any) -> dict[str, float]:
        return {}


def loader_of(**how: Any) -> Any:
    torch = pytest.importorskip("torch")
    data = torch.utils.data
    dataset = data.TensorDataset(torch.arange(48))
    return data.DataLoader(dataset, batch_size=8, **how)


def train(directory: Path, steps: int, make: Any, **how: Any) -> Any:
    fails_at = how.pop("fails_at", None)
    return fit(
        Counting(make, fails_at),
        steps=steps,
        backend="local",
        checkpoint_dir=directory,
        verbose=False,
        **how,
    )


def steps_seen() -> dict[int, list[int]]:
    """The samples of each step, of all ranks, in rank order."""
    found: dict[int, list[int]] = {}
    for (step, _, _), numbers in sorted(SEEN.items()):
        found.setdefault(step, []).extend(numbers)
    return found


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(0, id="in process"),
        pytest.param(1, id="with loading processes", marks=pytest.mark.nightly),
    ],
)
def test_each_sample_comes_once_an_epoch_whatever_happens(tmp_path: Path, workers: int) -> None:
    how: dict[str, Any] = {"shuffle": True, "num_workers": workers}
    if workers:
        how["multiprocessing_context"] = "spawn"
    SEEN.clear()
    train(tmp_path / "whole", 18, lambda seed: LoaderBatches(loader_of(shuffle=True), seed))
    whole = steps_seen()
    for epoch in range(3):
        numbers = [n for step in range(6 * epoch, 6 * epoch + 6) for n in whole[step]]
        assert Counter(numbers) == Counter(range(48))
    assert whole[0] != whole[6], "each epoch has an order of its own"
    SEEN.clear()
    make = lambda seed: LoaderBatches(loader_of(**how), seed)  # noqa: E731
    train(tmp_path / "parts", 8, make, fails_at=3)
    assert train(tmp_path / "parts", 18, make, num_workers=4).steps[0] == 9
    assert steps_seen() == whole, "the same samples in the same steps, on two and then on four"


def test_a_last_batch_is_filled_up_or_left_out() -> None:
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.arange(10))
    kept = LoaderBatches(torch.utils.data.DataLoader(dataset, batch_size=4))
    assert [kept.indices(step) for step in (2, 3)] == [[8, 9, 0, 1], [0, 1, 2, 3]]
    left = LoaderBatches(torch.utils.data.DataLoader(dataset, batch_size=4, drop_last=True))
    assert [left.indices(step) for step in (1, 2)] == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_a_sampler_is_told_the_epoch() -> None:
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.arange(8))
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0, seed=5)
    batches = LoaderBatches(torch.utils.data.DataLoader(dataset, batch_size=8, sampler=sampler))
    orders = [batches.indices(epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_what_has_no_steps_is_refused() -> None:
    torch = pytest.importorskip("torch")

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[name-defined,misc]
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(ConfigError, match="Stream can only be iterated"):
        LoaderBatches(torch.utils.data.DataLoader(Stream()))
    with pytest.raises(ConfigError, match=r"batch_size=8 is of all ranks .* their number, 3"):
        LoaderBatches(loader_of())(0, 0, 3)


ON_RAY = """
import json, os, ray, ray.data
from distnadam.errors import ConfigError
from distnadam.training.data import DatasetBatches

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
dataset, found = ray.data.range(48), {}
for shuffle in (False, True):
    batches = DatasetBatches(dataset, 8, shuffle=shuffle, seed=3)
    parts = [[batches(step, rank, 2)["id"].tolist() for step in range(9)] for rank in (0, 1)]
    again = DatasetBatches(dataset, 8, shuffle=shuffle, seed=3)
    late = [again(step, 0, 1)["id"].tolist() for step in range(7, 9)]
    found[str(shuffle)] = [[a + b for a, b in zip(*parts)], late]
try:
    DatasetBatches(dataset, 49)
except ConfigError as error:
    found["refused"] = str(error)
print("FOUND", json.dumps(found), flush=True)
ray.shutdown()
"""
"""In a process of its own: Ray Data's threads end theirs where Ray ends before them."""


def test_rows_of_a_ray_dataset_come_once_an_epoch() -> None:
    pytest.importorskip("ray.data")
    ended = subprocess.run(
        [sys.executable, "-c", ON_RAY], capture_output=True, text=True, check=False, timeout=250
    )
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    for shuffle in ("False", "True"):
        steps, late = found[shuffle]
        assert Counter(n for step in steps[:6] for n in step) == Counter(range(48))
        assert late == steps[7:], "begun amid an epoch"
    assert found["False"][0][:6] == np.arange(48).reshape(6, 8).tolist()
    assert found["True"][0][:3] != found["True"][0][6:], "each epoch has an order of its own"
    assert "fewer rows than batch_size=49" in found["refused"]
