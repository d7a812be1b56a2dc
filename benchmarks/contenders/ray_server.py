"""The synchronous parameter server of Ray's documentation, one actor, with Nadam in plain NumPy."""

import argparse
import json
import os
import time
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock, step_scalars


@ray.remote
class Server:
    def __init__(self, elements: int) -> None:
        self.p = np.zeros(elements, np.float32)
        self.m = np.zeros(elements, np.float32)
        self.v = np.zeros(elements, np.float32)
        self.clock = Clock()
        self.config = NadamConfig()

    def apply(self, *gradients: Any) -> Any:
        g = np.mean(gradients, axis=0) if len(gradients) > 1 else gradients[0]
        scalars = step_scalars(self.clock, self.config)
        self.clock = scalars.after
        f = np.float32
        gradient, momentum, epsilon = map(f, scalars.coefficients[:3])
        self.m += (g - self.m) * f(0.1)
        self.v += (g * g - self.v) * f(0.001)
        self.p -= (gradient * g + momentum * self.m) / (np.sqrt(self.v) + epsilon)
        return self.p


@ray.remote
class Trainer:
    def __init__(self, elements: int, seed: int) -> None:
        self.g = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32)

    def gradient(self, parameters: Any) -> Any:
        return self.g


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=10**6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    store = max(200 * 2**20, min(8 * 2**30, 4 * args.elements * 16))
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=store,
    )
    server = Server.remote(args.elements)
    trainers = [Trainer.remote(args.elements, rank) for rank in range(args.workers)]
    parameters = server.apply.remote(*[trainer.gradient.remote(None) for trainer in trainers])
    ray.wait([parameters], fetch_local=False)
    times = []
    for _ in range(args.steps):
        began = time.perf_counter()
        parameters = server.apply.remote(
            *[trainer.gradient.remote(parameters) for trainer in trainers]
        )
        ray.wait([parameters], fetch_local=False)
        times.append(time.perf_counter() - began)
    ray.shutdown()
    print(json.dumps(times))


if __name__ == "__main__":
    main()
