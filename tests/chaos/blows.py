"""How a fault is struck: at a random moment, at a random process."""

import signal
import time

import numpy as np

from tests.chaos.scene import Scene
from tests.chaos.trainers import WORKERS, Process

Rng = np.random.Generator


def pause(rng: Rng, longest_s: float = 0.1) -> None:
    """Let a random time pass, from nothing to a tenth of a second, most often about as long as a
    phase of a step takes.
    """
    time.sleep(rng.choice([0.0, 0.01, 0.1, 1.0]) * longest_s * rng.random())


def kill(*victims: Process) -> float:
    """Kill processes and return when."""
    moment = time.monotonic()
    for victim in victims:
        victim.signal(signal.SIGKILL)
    return moment


def any_rank(rng: Rng) -> int:
    """Return a rank."""
    return int(rng.integers(WORKERS))


def any_shard(scene: Scene, rng: Rng) -> int:
    """Return the index of a shard, of as many as there are now."""
    return int(rng.integers(scene.num_shards))
