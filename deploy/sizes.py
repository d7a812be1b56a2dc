#!/usr/bin/env python3
"""Computes the memory and /dev/shm that each kind of node needs for a model. Needs only Python.

    python3 deploy/sizes.py --parameters 1e9 --workers 8 --shards 4 --replicas 1 \\
        --shard-nodes 4 --workers-per-node 2

Parameters are float32, 4 bytes each. The section Sizes of deploy/README.md gives the formulas in
words; a test checks the manifests against them.
"""

import argparse
import math
from dataclasses import dataclass

MIB, GIB = 2**20, 2**30
SHM_SPARE = 64 * MIB
"""Room in /dev/shm beside Ray's object store."""
STORE_SPARE = 64 * MIB
RAY = GIB
DASHBOARD = GIB // 2
PROCESS = GIB // 4
SHM_STEP, MEMORY_STEP = 256 * MIB, GIB // 2


@dataclass(frozen=True)
class Run:
    """A model and how it is distributed.

    Args:
        parameters: number of elements of the model.
        workers: number of ranks.
        shards: number of shards.
        replicas: standbys of each shard, 0 or 1.
        shard_nodes: number of nodes that hold shards.
        workers_per_node: number of ranks on one node.
        ema: whether the shards keep an average of the parameters.
    """

    parameters: int
    workers: int
    shards: int
    replicas: int
    shard_nodes: int
    workers_per_node: int
    ema: bool = False

    @property
    def average(self) -> int:
        """The bytes of a parameter's average."""
        return 4 * self.ema

    @property
    def share(self) -> float:
        """The fraction of all shards that one node holds after another one has died."""
        return 1 / max(1, self.shard_nodes - 1)


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


def shard_node(run: Run) -> Node:
    """Return the needs of a node with shards and no workers."""
    return _node(*_shards(run))


def worker_node(run: Run) -> Node:
    """Return the needs of a node with workers and no shards, without those of the task itself."""
    objects, own, processes = _workers(run)
    arriving = 12 * run.parameters  # the first parameters, or those after a rewind
    arena = 8 * run.parameters  # both buffers, which the relay fills for all workers of the node
    return _node(objects + arriving, own + arena, processes)


def shared_node(run: Run) -> Node:
    """Return the needs of a node with shards and workers, without those of the task itself."""
    return _node(*(a + b for a, b in zip(_shards(run), _workers(run), strict=True)))


def head_node(run: Run) -> Node:
    """Return the needs of the head's node, with the process that calls fit, and no shard or worker.

    That process makes the first parameters.
    """
    return _node(12 * run.parameters, 12 * run.parameters, DASHBOARD + 2 * PROCESS)


def _shards(run: Run) -> tuple[float, float, int]:
    """Return the bytes of Ray objects, of the shards' own memory, and of their processes."""
    params = run.parameters
    # gradients in and parameters out for each worker, where TCP cannot be had; a state that moves
    by_objects = run.share * 8 * params * run.workers
    objects = by_objects + run.share * (12 + run.average) * params
    by_tcp = run.share * params * between_hosts(run.workers)
    # both buffers of parameters, which all shards of a node share
    arena = 8 * params
    # moments; a save in the background; a standby with the rounds it has yet to apply; the average
    # is in each of these
    state = run.share * params * (8 + 12 + 20 * run.replicas + run.average * (2 + run.replicas))
    processes = math.ceil(run.shards * (1 + run.replicas) * run.share) + 1  # and the supervisor
    # what goes to and comes from other nodes takes the one memory or the other
    return objects, arena + state + max(0, by_tcp - by_objects), processes * PROCESS


def between_hosts(workers: int) -> int:
    """Return a shard's bytes for each parameter where all workers are on other nodes, by TCP.

    Each worker's gradients arrive in memory of their own, and two to spare; two copies of the
    parameters go out while the next step is made.
    """
    return 4 * (workers + 2) + 4 * 2


def _workers(run: Run) -> tuple[float, float, int]:
    """Return the same for workers: each has its gradients; the node's relay is a process too."""
    return (
        run.workers_per_node * 8 * run.parameters,
        run.workers_per_node * 4 * run.parameters,
        (run.workers_per_node + 1) * PROCESS,
    )


def _node(objects: float, own: float, processes: int) -> Node:
    shm = _up(objects + STORE_SPARE + SHM_SPARE, SHM_STEP)
    return Node(shm - SHM_SPARE, shm, _up(shm + own + processes + RAY, MEMORY_STEP))


def _up(size: float, step: int) -> int:
    return -int(-size // step) * step


def _elements(text: str) -> int:
    """Parse a number of elements, a whole number that may be written 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, such as 1e9, got {text!r}"
        )
    return int(value)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main() -> None:
    """Print the needs of each kind of node."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--parameters", type=_elements, required=True, help="elements of the model, such as 1e9"
    )
    for name, default, text in (
        ("workers", 2, "ranks in all"),
        ("shards", 2, "shards in all"),
        ("shard-nodes", 1, "nodes that hold shards"),
        ("workers-per-node", 1, "ranks on one node"),
    ):
        parser.add_argument(
            f"--{name}", type=_count, default=default, help=f"{text}  [default: {default}]"
        )
    parser.add_argument(
        "--replicas",
        type=int,
        choices=(0, 1),
        default=0,
        help="standbys of each shard  [default: 0]",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the shards keep an average of the parameters (use_ema)"
    )
    run = Run(**vars(parser.parse_args()))
    if run.workers_per_node > run.workers:
        parser.error(
            f"argument --workers-per-node: {run.workers_per_node} on one node are more than the "
            f"{run.workers} workers in all"
        )
    print(f"{'node with':<20} {'/dev/shm':>10} {'memory':>10}   --object-store-memory")
    kinds = {
        "shards": shard_node,
        "workers": worker_node,
        "shards and workers": shared_node,
        "head": head_node,
    }
    for kind, size in kinds.items():
        node = size(run)
        print(f"{kind:<20} {node.shm // MIB:>7} Mi {node.memory // MIB:>7} Mi   {node.store}")


if __name__ == "__main__":
    main()
