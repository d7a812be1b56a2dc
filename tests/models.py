"""Seeded models and gradients for the tests, runs of several workers, and their bits."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optree

from distnadam import DistNadam


def params(seed: int = 0) -> dict[str, Any]:
    """Return tensors of every dtype and kind of shape; some span chunks, where shards cut them."""
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "kernel": rng.standard_normal((90, 70)).astype(np.float32),
            "bias": np.zeros(70, np.float32),
        },
        "layers": [
            rng.standard_normal(5000).astype(np.float64),
            (np.float32(0.5), np.zeros((0, 3), np.float32)),
        ],
        "half": rng.standard_normal((40, 50)).astype(np.float16),
    }


def gradients(step: int, rank: int, seed: int = 0) -> dict[str, Any]:
    """Return one rank's gradients of a step, of very different magnitudes; seeded by both."""
    rng = np.random.default_rng([seed, step, rank])
    scale = 10.0 ** rng.integers(-3, 2)
    return {
        "dense": {
            "kernel": (rng.standard_normal((90, 70)) * scale).astype(np.float32),
            "bias": rng.standard_normal(70).astype(np.float32),
        },
        "layers": [
            rng.standard_normal(5000) * scale,
            (np.float32(rng.standard_normal()), np.zeros((0, 3), np.float32)),
        ],
        "half": rng.standard_normal((40, 50)).astype(np.float16),
    }


def lacking(tree: Any, step: int, rank: int) -> Any:
    """Return gradients without some of the tensors: one that all ranks lack, and some that this one
    does; never all.
    """
    found, drawn = leaves(tree), np.random.default_rng([9, step, rank]).random(16)
    for index in range(1, len(found)):
        if index == 1 + step % 4 or drawn[index] < 0.3:
            found[index] = None
    return optree.tree_unflatten(optree.tree_structure(tree), found)


def given(optimizer: DistNadam, step: int, rank: int) -> Any:
    """Return one rank's gradients of a step, some of which it lacks where tensors have clocks."""
    tree = gradients(step, rank)
    return lacking(tree, step, rank) if optimizer.get_config()["clocks"] == "tensor" else tree


def drifting(step: int, rank: int, seen: Any) -> dict[str, Any]:
    """Return one rank's gradients of a step that depend on the parameters that it sees."""
    tree = gradients(step, rank)
    found = [
        np.asarray(noise, np.float64) + 0.1 * np.asarray(leaf, np.float64)
        for noise, leaf in zip(leaves(tree), leaves(seen), strict=True)
    ]
    narrow = [x.astype(np.asarray(leaf).dtype) for x, leaf in zip(found, leaves(tree), strict=True)]
    return optree.tree_unflatten(optree.tree_structure(tree), narrow)


def leaves(tree: Any) -> list[Any]:
    """Return the tree's leaves, dict keys sorted."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for child in tree for leaf in leaves(child)]
    return [tree]


def bits(optimizer: DistNadam) -> list[bytes]:
    """Return the bits of all that the optimizer holds: its clocks, the params, their average where
    one is kept, ms, vs.
    """
    params = leaves(optimizer.get_params())
    if optimizer.get_config()["use_ema"]:
        params += leaves(optimizer.get_ema_params())
    clock, state = optimizer.shards.read(("m", "v"))
    moments = [view for flat in state.values() for view in optimizer.shards.layout.views(flat)]
    return [repr(clock).encode(), *(np.asarray(x).tobytes() for x in (*params, *moments))]


def run_drifting(optimizer: DistNadam, begin: int, end: int, *, num_workers: int = 2) -> None:
    """Run steps [begin, end) of gradients that depend on what each rank sees, in this thread."""
    workers = [optimizer.worker(rank) for rank in range(num_workers)]
    for step in range(begin, end):
        tickets = [
            worker.push(drifting(step, rank, worker.pull())) for rank, worker in enumerate(workers)
        ]
        for ticket in tickets:
            ticket.result()


def run(
    optimizer: DistNadam,
    begin: int,
    end: int,
    *,
    order: Callable[[int], Sequence[int]] | None = None,
    num_workers: int = 2,
) -> None:
    """Run steps [begin, end) with all ranks in this process.

    They run in threads, or one after another in a given order per step.
    """
    if order is not None:
        workers = [optimizer.worker(rank) for rank in range(num_workers)]
        for step in range(begin, end):
            tickets = [workers[rank].push(given(optimizer, step, rank)) for rank in order(step)]
            for ticket in tickets:
                ticket.result()
        return
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with optimizer.worker(rank) as worker:
                for step in range(begin, end):
                    worker.step(given(optimizer, step, rank))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
