"""Changes in the middle of training: a reshard, a worker that leaves and joins again; and deaths
meanwhile.
"""

import time
from collections.abc import Callable

from distnadam.errors import ClusterError
from tests.chaos.blows import Rng, any_rank, any_shard, kill, pause
from tests.chaos.scene import Scene
from tests.chaos.trainers import Process, despite_rewinds

_RESHARD_S = 1.5
"""About how long a reshard takes, most of it to make processes."""


def reshard(scene: Scene, rng: Rng) -> float:
    moment = time.monotonic()
    count = _another_count(scene, rng)
    despite_rewinds(lambda: scene.optimizer.reshard(count))
    assert scene.num_shards == count
    return moment


def shard_during_reshard(scene: Scene, rng: Rng) -> float:
    """The new shards hold the state, or the old ones go on: never some of each."""
    victim = scene.shards()[any_shard(scene, rng)]
    return _reshard_while(scene, rng, lambda: victim)


def supervisor_during_reshard(scene: Scene, rng: Rng) -> float:
    victim = scene.supervisor()
    return _reshard_while(scene, rng, lambda: victim)


def _reshard_while(scene: Scene, rng: Rng, victim: Callable[[], Process]) -> float:
    moments: list[float] = []

    def kill_it() -> None:
        pause(rng, _RESHARD_S)
        moments.append(kill(victim()))

    count = _another_count(scene, rng)
    with scene.beside(kill_it):
        try:
            despite_rewinds(lambda: scene.optimizer.reshard(count))
        except ClusterError as error:
            print(f"  the reshard failed: {error}", flush=True)
    return moments[0]


def _another_count(scene: Scene, rng: Rng) -> int:
    """Another number of shards, of those that leave the faults of this configuration possible."""
    least = min(scene.case.num_shards, 2)
    return int(
        rng.choice([count for count in range(least, least + 3) if count != scene.num_shards])
    )


def worker_leaves(scene: Scene, rng: Rng) -> float:
    """The mean is over those present until it joins again, at a boundary."""
    with scene.away(any_rank(rng)) as moment:
        scene.await_step(time.monotonic())
        pause(rng)
    return moment


def shard_while_a_worker_is_away(scene: Scene, rng: Rng) -> float:
    """Without standbys all go back to before it left, and the rounds without it are replayed
    without it.
    """
    with scene.away(any_rank(rng)):
        scene.await_step(time.monotonic())
        moment = kill(scene.shards()[any_shard(scene, rng)])
        if rng.random() < 0.5:
            scene.await_step(moment)
    return moment
