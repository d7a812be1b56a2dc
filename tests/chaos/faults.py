"""The kinds of fault, as a table. Each is struck at a scene that is training, and returns when the
death, or the halt, was.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import ray
from ray.exceptions import RayActorError

from distnadam import DistNadam
from tests.chaos import changes
from tests.chaos.blows import Rng, any_rank, any_shard, kill, pause
from tests.chaos.scene import SHARD_TIMEOUT_S, Case, Scene
from tests.chaos.trainers import WORKERS, Process, despite_rewinds, superseded
from tests.chaos.visitors import visit

_HALT_S = 1.5


@dataclass(frozen=True)
class Fault:
    """One kind: its name, the cases in which it can be struck, and the strike."""

    name: str
    fits: Callable[[Case], bool]
    kill: Callable[[Scene, Rng], float]


# Workers


def worker(scene: Scene, rng: Rng) -> float:
    victim = scene.crowd.process(any_rank(rng))
    pause(rng)
    return kill(victim)


def worker_between_doorbells(scene: Scene, rng: Rng) -> float:
    """The worker's message reaches some shards only: the push, or with clipping the norms."""
    rank, count = any_rank(rng), scene.num_shards
    reached = tuple(int(i) for i in range(count) if rng.random() < 0.5)
    post = int(rng.integers(1, 3)) if scene.case.clipnorm else 1
    victim = scene.crowd.process(rank)
    with contextlib.suppress(RayActorError):  # it may die before it has said that it will
        ray.get(scene.crowd.actor(rank).doom.remote(reached, post))
    while victim.alive:
        time.sleep(1e-4)
    return time.monotonic()


def worker_halts(scene: Scene, rng: Rng) -> float:
    victim = scene.crowd.process(any_rank(rng))
    pause(rng)
    return _halt(victim, rng)


def _halt(victim: Process, rng: Rng) -> float:
    moment = time.monotonic()
    victim.signal(signal.SIGSTOP)
    time.sleep(_HALT_S * rng.random())
    victim.signal(signal.SIGCONT)
    return moment


def worker_halts_and_is_replaced(scene: Scene, rng: Rng) -> float:
    """The one that wakes up must be refused, and what it had on its way must not count twice."""
    rank = any_rank(rng)
    victim = scene.crowd.process(rank)
    pause(rng)
    moment = time.monotonic()
    victim.signal(signal.SIGSTOP)
    old = scene.crowd.replace(rank)
    scene.await_step(time.monotonic())
    victim.signal(signal.SIGCONT)
    assert superseded(old, 60.0), f"worker {rank} was replaced, woke up, and was not refused"
    return moment


def all_workers(scene: Scene, rng: Rng) -> float:
    victims = [scene.crowd.process(rank) for rank in range(WORKERS)]
    pause(rng)
    return kill(*victims)


# Shards and standbys


def shard(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    victim = scene.shards()[any_shard(scene, rng)]
    pause(rng)
    return kill(victim)


def shard_again_at_once(scene: Scene, rng: Rng) -> float:
    """A second death while the first is being recovered from."""
    index = any_shard(scene, rng)
    first = scene.shards()[index]
    kill(first)
    time.sleep(rng.random())
    return kill(scene.shards().get(any_shard(scene, rng), first))


def shard_halts(scene: Scene, rng: Rng) -> float:
    victim = scene.shards()[any_shard(scene, rng)]
    pause(rng)
    return _halt(victim, rng)


def shard_halts_and_is_replaced(scene: Scene, rng: Rng) -> float:
    victim = scene.shards()[any_shard(scene, rng)]
    pause(rng)
    moment = time.monotonic()
    victim.signal(signal.SIGSTOP)
    while victim.alive and time.monotonic() < moment + 10 * SHARD_TIMEOUT_S:
        time.sleep(0.01)
    victim.signal(signal.SIGCONT)
    return moment


def standby(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    victim = scene.standbys()[any_shard(scene, rng)]
    pause(rng)
    return kill(victim)


def standby_halts(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    victim = scene.standbys()[any_shard(scene, rng)]
    pause(rng)
    return _halt(victim, rng)


def shard_and_standby(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    index = any_shard(scene, rng)
    victims = [scene.shards()[index], scene.standbys()[index]]
    pause(rng)
    return kill(*(victims if rng.random() < 0.5 else reversed(victims)))


def two_shards(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    shards = scene.shards()
    first, second = (
        shards[int(i)] for i in rng.permutation(len(shards))[:2]
    )  # a reshard leaves as many at least
    pause(rng)
    kill(first)
    pause(rng)
    return kill(second)


def all_shards(scene: Scene, rng: Rng) -> float:
    victims = scene.shards().values()
    pause(rng)
    return kill(*victims)


def shard_and_worker(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    victims = [scene.shards()[any_shard(scene, rng)], scene.crowd.process(any_rank(rng))]
    pause(rng)
    return kill(*(victims if rng.random() < 0.5 else reversed(victims)))


# Those who act on the optimizer as a whole


def reader(scene: Scene, rng: Rng) -> float:
    victim, _call = visit(scene, "read")
    time.sleep(0.05)
    pause(rng)
    return kill(victim)


def holder(scene: Scene, rng: Rng) -> float:
    """It dies while it holds all shards, who wait for it until it counts as gone."""
    _, call = visit(scene, "hold")
    try:
        ray.get(call)
    except RayActorError:
        return time.monotonic()
    raise AssertionError("the holder lives")


def saver(scene: Scene, rng: Rng) -> float:
    victim, _call = visit(scene, "save")
    time.sleep(0.05)
    pause(rng)
    return kill(victim)


def shard_during_save(scene: Scene, rng: Rng) -> float:
    """The save is done again after the recovery and its checkpoint is whole."""
    victim = scene.shards()[any_shard(scene, rng)]
    moments: list[float] = []

    def kill_it() -> None:
        pause(rng)
        moments.append(kill(victim))

    with scene.beside(kill_it):
        path = despite_rewinds(lambda: scene.optimizer.save(scene.directory / "checkpoints"))
    DistNadam.restore(path, num_shards=1, backend="local").close()
    return moments[0]


# Who decides


def supervisor(scene: Scene, rng: Rng) -> float:
    victim = scene.supervisor()
    pause(rng)
    return kill(victim)


def supervisor_and_shard(scene: Scene, rng: Rng) -> float:
    scene.await_standbys()
    victims = [scene.supervisor(), scene.shards()[any_shard(scene, rng)]]
    pause(rng)
    return kill(*(victims if rng.random() < 0.5 else reversed(victims)))


def driver(scene: Scene, rng: Rng) -> float:
    """Who built the optimizer dies; the others go on, and so does a new process that connects."""
    pause(rng)
    moment = time.monotonic()
    assert scene.driver is not None
    scene.driver.kill()
    scene.driver.wait()
    scene.driver = None
    scene.connect_from_a_new_process()
    return moment


def node(scene: Scene, rng: Rng) -> float:
    """A Ray node dies with the shards, standbys, workers, and perhaps the supervisor that live
    there.
    """
    scene.await_standbys()
    assert scene.nodes is not None
    pause(rng)
    return scene.nodes.kill_one()


def _several(case: Case) -> bool:
    return case.num_shards > 1


_any, _replicated, _named, _elastic = (
    attrgetter("num_shards"),
    attrgetter("replicas"),
    attrgetter("named"),
    attrgetter("elastic"),
)

FAULTS = (
    Fault("worker killed", _any, worker),
    Fault("worker killed between doorbells", _any, worker_between_doorbells),
    Fault("worker halts", _any, worker_halts),
    Fault("worker halts and is replaced", _any, worker_halts_and_is_replaced),
    Fault("all workers killed", _any, all_workers),
    Fault("shard killed", _any, shard),
    Fault("shard killed again at once", _any, shard_again_at_once),
    Fault("shard halts", _any, shard_halts),
    Fault("shard halts and is replaced", _any, shard_halts_and_is_replaced),
    Fault("standby killed", _replicated, standby),
    Fault("standby halts", _replicated, standby_halts),
    Fault("shard and standby killed", _replicated, shard_and_standby),
    Fault("two shards killed", _several, two_shards),
    Fault("all shards killed", _any, all_shards),
    Fault("shard and worker killed", _any, shard_and_worker),
    Fault("reader killed", _any, reader),
    Fault("holder killed", _any, holder),
    Fault("saver killed", _any, saver),
    Fault("shard killed during a save", _any, shard_during_save),
    Fault("supervisor killed", _named, supervisor),
    Fault("supervisor and shard killed", _named, supervisor_and_shard),
    Fault("driver killed", _named, driver),
    Fault("reshard", _any, changes.reshard),
    Fault("shard killed during a reshard", _any, changes.shard_during_reshard),
    Fault("supervisor killed during a reshard", _named, changes.supervisor_during_reshard),
    Fault("worker leaves and joins again", _elastic, changes.worker_leaves),
    Fault("shard killed while a worker is away", _elastic, changes.shard_while_a_worker_is_away),
    Fault("node killed", lambda case: case.nodes > 1, node),
)
