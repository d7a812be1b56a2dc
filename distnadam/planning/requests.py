"""What shards and workers ask of Ray, by resource."""

from collections.abc import Mapping

from distnadam.config import Options


def shard_ask(options: Options) -> dict[str, float]:
    """Return what each shard asks of Ray, by resource."""
    return {
        "CPU": options.shard_cpus,
        "memory": float(options.shard_memory_bytes),
        **options.shard_resources,
    }


def worker_ask(options: Options) -> dict[str, float]:
    """Return what each of `fit`'s workers asks of Ray, by resource."""
    return {"CPU": options.worker_cpus, "GPU": options.worker_gpus}


def asked_by_workers(options: Options) -> str:
    """Return what each worker asks of Ray, in words."""
    asked = " and ".join(f"{name} {amount:g}" for name, amount in worker_ask(options).items())
    labels = dict(options.worker_label_selector)
    return asked + (f" and the labels {labels}" if labels else "")


def process_awaited(options: Options, free: Mapping[str, float]) -> str:
    """Return what a worker waits for that has no process yet, given what is free in the cluster.

    >>> process_awaited(Options(), {"CPU": 2.0})
    'for its process to start and to import what the task imports'
    >>> process_awaited(Options(worker_cpus=4), {"CPU": 2.0})
    'for its process, which asks CPU 4 and GPU 0; free in the cluster: CPU 2, GPU 0'
    """
    asked = worker_ask(options)
    left = {name: free.get(name, 0.0) for name in asked}
    if not options.worker_label_selector and all(asked[name] <= left[name] for name in asked):
        return "for its process to start and to import what the task imports"
    in_words = ", ".join(f"{name} {amount:g}" for name, amount in left.items())
    return (
        f"for its process, which asks {asked_by_workers(options)}; free in the cluster: {in_words}"
    )
