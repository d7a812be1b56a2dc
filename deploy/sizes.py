#!/usr/bin/env python3
"""How much memory and /dev/shm a node needs, from the model's size and how it is spread. Needs
nothing but Python.

    python3 deploy/sizes.py --parameters 1e9 --workers 8 --shards 4 --replicas 1 --shard-nodes 4
    --workers-per-node 2

Parameters are float32, 4 bytes. deploy/README.md, Sizes, says the formulas in words; a test holds
the manifests to them.
"""

import argparse
import math
from dataclasses import dataclass

MIB, GIB = 2**20, 2**30
SHM_SPARE = 64 * MIB
"""What /dev/shm has beyond Ray's object store."""
STORE_SPARE = 64 * MIB
RAY = GIB
DASHBOARD = GIB // 2
PROCESS = GIB // 4
SHM_STEP, MEMORY_STEP = 256 * MIB, GIB // 2


@dataclass(frozen=True)
class Run:
    """A model and how it is spread.

    Args:
        parameters: elements of the model.
        workers: ranks in all.
        shards: shards in all.
        replicas: standbys of each shard, 0 or 1.
        shard_nodes: nodes that hold shards.
        workers_per_node: ranks on one node.
    """

    parameters: int
    workers: int
    shards: int
    replicas: int
    shard_nodes: int
    workers_per_node: int

    @property
    def share(self) -> float:
        """The part of all shards that one node holds once another has died."""
        return 1 / max(1, self.shard_nodes - 1)


@dataclass(frozen=True)
class Node:
    """What one node needs, in bytes: Ray's object store, the /dev/shm that it lies in, and memory,
    which both count against.
    """

    store: int
    shm: int
    memory: int


def shard_node(run: Run) -> Node:
    """A node that holds shards and no workers."""
    return _node(*_shards(run))


def worker_node(run: Run) -> Node:
    """A node that holds workers and no shards; what the task itself needs comes on top."""
    objects, own, processes = _workers(run)
    return _node(
        objects + 12 * run.parameters, own, processes
    )  # and the first parameters, or those after a rewind


def shared_node(run: Run) -> Node:
    """A node that holds shards and workers; what the task itself needs comes on top."""
    return _node(*(a + b for a, b in zip(_shards(run), _workers(run), strict=True)))


def head_node(run: Run) -> Node:
    """A node that holds the head and the process that called fit, which makes the first parameters,
    and no shard or worker.
    """
    return _node(12 * run.parameters, 12 * run.parameters, DASHBOARD + 2 * PROCESS)


def _shards(run: Run) -> tuple[float, float, int]:
    """Bytes of objects, of the shards' own memory, and of processes."""
    params = run.parameters
    objects = run.share * (
        8 * params * run.workers + 12 * params
    )  # gradients in and parameters out; a state that moves
    lanes = 8 * params  # both buffers of parameters, which all shards of a node share
    state = (
        run.share * params * (8 + 12 + 20 * run.replicas)
    )  # moments; a save behind the training; a standby, and what it follows
    processes = math.ceil(run.shards * (1 + run.replicas) * run.share) + 1  # and the supervisor
    return objects, lanes + state, processes * PROCESS


def _workers(run: Run) -> tuple[float, float, int]:
    """The same of workers, of whom each has its gradients, and its copy of parameters that come
    from elsewhere.
    """
    bytes_each = 8 * run.parameters
    return (
        run.workers_per_node * bytes_each,
        run.workers_per_node * bytes_each,
        run.workers_per_node * PROCESS,
    )


def _node(objects: float, own: float, processes: int) -> Node:
    shm = _up(objects + STORE_SPARE + SHM_SPARE, SHM_STEP)
    return Node(shm - SHM_SPARE, shm, _up(shm + own + processes + RAY, MEMORY_STEP))


def _up(size: float, step: int) -> int:
    return -int(-size // step) * step


def _elements(text: str) -> int:
    """Elements of a model; 1e9 is a number of them, 0.5, nan and inf are not."""
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
    """Print what each kind of node needs."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--parameters", type=_elements, required=True, help="elements of the model, such as 1e9"
    )
    for name, default, told in (
        ("workers", 2, "ranks in all"),
        ("shards", 2, "shards in all"),
        ("shard-nodes", 1, "nodes that hold shards"),
        ("workers-per-node", 1, "ranks on one node"),
    ):
        parser.add_argument(
            f"--{name}", type=_count, default=default, help=f"{told}, {default} unless told"
        )
    parser.add_argument(
        "--replicas",
        type=int,
        choices=(0, 1),
        default=0,
        help="standbys of each shard, 0 unless told",
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
