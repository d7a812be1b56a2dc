"""The memory and /dev/shm that each kind of node needs for a run.

The section Sizes of deploy/README.md gives the formulas in words; a test checks the manifests there
against them.
"""

import math
from dataclasses import dataclass

from distnadam.planning.planned_run import FLOAT32_BYTES, PlannedRun

MIB, GIB = 2**20, 2**30
SHM_SPARE = 64 * MIB
"""Room in /dev/shm beside Ray's object store."""
STORE_SPARE = 64 * MIB
RAY = GIB
DASHBOARD = GIB // 2
PROCESS = GIB // 4
SHM_STEP, MEMORY_STEP = 256 * MIB, GIB // 2


@dataclass(frozen=True)
class Node:
    """What one node needs, in bytes.

    Args:
        store: Ray's object store.
        shm: /dev/shm, which holds the object store.
        memory: in all, /dev/shm included.
    """

    store: int
    shm: int
    memory: int


def shard_node(run: PlannedRun) -> Node:
    """Return the needs of a node with shards and no workers."""
    return _node(*_shards(run))


def worker_node(run: PlannedRun) -> Node:
    """Return the needs of a node with workers and no shards, without those of the task itself."""
    objects, own, processes = _workers(run)
    arriving = 12 * run.parameters  # the first parameters, or those after a rewind
    arena = 8 * run.parameters  # both buffers, which the relay fills for all workers of the node
    return _node(objects + arriving, own + arena, processes)


def shared_node(run: PlannedRun) -> Node:
    """Return the needs of a node with shards and workers, without those of the task itself."""
    objects, own, processes = _shards(run)
    more_objects, more_own, more_processes = _workers(run)
    return _node(objects + more_objects, own + more_own, processes + more_processes)


def head_node(run: PlannedRun) -> Node:
    """Return the needs of the head's node, with the process that calls fit, and no shard or worker.

    That process makes the first parameters.
    """
    return _node(12 * run.parameters, 12 * run.parameters, DASHBOARD + 2 * PROCESS)


def _share(run: PlannedRun) -> float:
    """Return the fraction of all shards that one node holds after another one has died."""
    return 1 / max(1, run.num_shard_hosts - 1)


def _average(run: PlannedRun) -> int:
    """Return the bytes of a parameter's average."""
    return FLOAT32_BYTES * run.ema


def _shards(run: PlannedRun) -> tuple[float, float, int]:
    """Return the bytes of Ray objects, of the shards' own memory, and of their processes."""
    params, share, average = run.parameters, _share(run), _average(run)
    # gradients in and parameters out for each worker, where TCP cannot be had; a state that moves
    by_objects = share * 8 * params * run.workers
    objects = by_objects + share * (12 + average) * params
    by_tcp = share * params * between_hosts(run.workers)
    # both buffers of parameters, which all shards of a node share
    arena = 8 * params
    # moments; a save in the background; a standby with the rounds it has yet to apply; the average
    # is in each of these
    state = share * params * (8 + 12 + 20 * run.replicas + average * (2 + run.replicas))
    processes = math.ceil(run.num_shards * (1 + run.replicas) * share) + 1  # and the supervisor
    # what goes to and comes from other nodes takes the one memory or the other
    return objects, arena + state + max(0, by_tcp - by_objects), processes * PROCESS


def between_hosts(workers: int) -> int:
    """Return a shard's bytes for each parameter where all workers are on other nodes, by TCP.

    Each worker's gradients arrive in memory of their own, and two to spare; two copies of the
    parameters go out while the next step is made.
    """
    return 4 * (workers + 2) + 4 * 2


def _workers(run: PlannedRun) -> tuple[float, float, int]:
    """Return the same for workers: each has its gradients; the node's relay is a process too."""
    return (
        run.workers_per_host * 8 * run.parameters,
        run.workers_per_host * 4 * run.parameters,
        (run.workers_per_host + 1) * PROCESS,
    )


def _node(objects: float, own: float, processes: int) -> Node:
    shm = _up(objects + STORE_SPARE + SHM_SPARE, SHM_STEP)
    return Node(shm - SHM_SPARE, shm, _up(shm + own + processes + RAY, MEMORY_STEP))


def _up(size: float, step: int) -> int:
    return -int(-size // step) * step
