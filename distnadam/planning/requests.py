"""What shards and workers ask of Ray, by resource."""

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
