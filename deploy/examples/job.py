"""A training job for `ray job submit`, on the head:

    ray job submit --working-dir . -- python3 job.py <checkpoints>

`<checkpoints>` is a directory that every host shares, or a URL such as s3://bucket/run. Submitted
again, the job continues from the newest checkpoint.

Jobs are submitted to the dashboard, which only the head itself reaches. From elsewhere, forward its
port first, by `ssh -L 8265:127.0.0.1:8265 <head>` or `kubectl port-forward --namespace distnadam
svc/distnadam-head-svc 8265`, and submit with the cluster's token and `--address
http://127.0.0.1:8265`.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from distnadam import DistNadam, fit


class Line:
    """Fit the line y = 3x + 1."""

    name = "line"

    def init(self, seed: int) -> Any:
        """Return the initial parameters."""
        self.seed = seed
        return {"slope": np.float32(0), "offset": np.float32(0)}

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        """Return one rank's batch of one step."""
        x = (
            np.random.default_rng([self.seed, step, rank, world_size])
            .standard_normal(32)
            .astype(np.float32)
        )
        return x, 3 * x + 1

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        """Return the mean squared error and its gradients."""
        x, y = batch
        error = params["slope"] * x + params["offset"] - y
        return float((error**2).mean()), {
            "slope": 2 * (error * x).mean(),
            "offset": 2 * error.mean(),
        }

    def evaluate(self, params: Any) -> Mapping[str, float]:
        """Return the fitted slope and offset."""
        return {"slope": float(params["slope"]), "offset": float(params["offset"])}


def main(checkpoints: str) -> None:
    """Train, and print the line."""
    history = fit(
        Line(),
        steps=300,
        optimizer=DistNadam(lr=0.1),
        backend="ray",
        checkpoint_dir=checkpoints,
        save_every=100,
    )
    print(f"y = {history.metrics['slope']:.2f} x + {history.metrics['offset']:.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
