"""A synthetic task for hosts, as large and as slow as a test needs, and the bits of a run's end."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from distnadam import DistNadam


class Synthetic:
    """Parameters that go towards a target, with noise of each rank's own, in a few passes per step.

    Args:
        size: number of parameters.
        pause_s: the least seconds of a gradient.
        awaits: a step, and the file that must exist before any rank begins it.
    """

    name = "synthetic"

    def __init__(
        self, size: int, pause_s: float = 0.0, awaits: tuple[int, str] | None = None
    ) -> None:
        self.size = size
        self.pause_s = pause_s
        self.awaits = awaits

    def init(self, seed: int) -> Any:
        self.seed = seed
        return {"w": np.linspace(-1, 1, self.size, dtype=np.float32)}

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        time.sleep(self.pause_s)
        while (
            self.awaits is not None and step == self.awaits[0] and not Path(self.awaits[1]).exists()
        ):
            time.sleep(0.01)  # the test's own time limit bounds it
        noise = (
            np.random.default_rng([self.seed, step, rank, world_size])
            .standard_normal(1024)
            .astype(np.float32)
        )
        return np.resize(noise, self.size)

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        error = params["w"] - np.float32(0.5) + np.float32(0.1) * batch
        return float(np.abs(error[:1000]).mean()), {"w": error}

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"mean": float(params["w"].mean())}


def digest(directory: str | Path) -> dict[str, str]:
    """Return the bits of the newest checkpoint: of the parameters, and of all of `get_weights`."""
    with DistNadam.restore(directory, num_shards=1, backend="local") as optimizer:
        return digest_of(optimizer)


def digest_of(optimizer: DistNadam) -> dict[str, str]:
    """Return the bits that an optimizer holds."""
    weights, params = optimizer.get_weights(), optimizer.get_params()
    leaves = (
        list(params.values())
        if isinstance(params, dict)
        else [layer[key] for layer in params for key in sorted(layer)]
    )
    return {"params": _hash(leaves), "weights": _hash(weights), "iterations": str(int(weights[0]))}


def _hash(arrays: list[Any]) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(json.dumps([str(array.dtype), list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
