"""distnadam on Ray: actors as workers, from "gradient ready" to "new parameters read"."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray

from distnadam import DistNadam, Options
from distnadam.backends.ray import registry


@ray.remote(num_cpus=0)
class Trainer:
    def __init__(self, optimizer: DistNadam, rank: int) -> None:
        self.worker = optimizer.worker(rank)

    def run(self, mode: str, steps: int, seed: int) -> list[float]:
        worker, rng = self.worker, np.random.default_rng(seed)
        shapes = {path: leaf.shape for path, leaf in worker.parameters().items()}
        if mode == "copy":
            gradients: Any = {
                path: rng.standard_normal(shape, dtype=np.float32) for path, shape in shapes.items()
            }
        else:
            gradients = None
            for view in worker.gradients().values():
                rng.standard_normal(out=view, dtype=np.float32)
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            worker.step(gradients)
            times.append(time.perf_counter() - began)
        return times

    def pid(self) -> int:
        return os.getpid()


def memory_of(pids: list[int]) -> tuple[int, int]:
    """Return the bytes that processes use in all, and of them those of Ray's object store.

    A shared page counts in proportion to the number of processes that map it.
    """
    total = store = 0
    for pid in pids:
        mapped = ""
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            fields = line.split()
            if not fields[0].endswith(":"):
                mapped = line
            elif fields[0] == "Pss:":
                total += int(fields[1]) * 1024
                store += int(fields[1]) * 1024 if "/plasma" in mapped else 0
    return total, store


def scheduled(pids: list[int]) -> tuple[int, int]:
    """Return the nanoseconds that processes' threads have run, and have waited for a core."""
    found = [
        path.read_text().split()
        for pid in pids
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
    ]
    return sum(int(ran) for ran, _, _ in found), sum(int(waited) for _, waited, _ in found)


def standbys_of(optimizer: DistNadam, count: int, shards: list[int]) -> list[int]:
    """Wait until `count` standbys follow, and return the ids of their processes.

    They are the optimizer's processes that are neither shards nor the supervisor.
    """
    running = optimizer.shards
    while sum(seen.replicated is not None for seen in running.describe_all()) < count:
        time.sleep(0.1)
    addresses = registry.addresses_of(running.backend.run_id)
    pids = {address.pid for address in addresses} - set(shards)  # type: ignore[attr-defined]
    return [pid for pid in pids if "Supervisor" not in Path(f"/proc/{pid}/cmdline").read_text()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=10**6)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--mode", choices=["copy", "views"], default="copy")
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replicas", type=int, choices=(0, 1), default=0)
    parser.add_argument("--tensors", type=int, default=1)
    parser.add_argument(
        "--memory",
        action="store_true",
        help="print the memory of shards and workers on standard error",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="print the CPU time of each process in a step on standard error",
    )
    args = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    options = Options(
        kernel=args.kernel,
        transport=args.transport,
        check_gradients=not args.unchecked,
        retain_initial=not args.memory,  # the plan below does not count the copy for a rewind
    )
    sizes = [
        args.elements * (i + 1) // args.tensors - args.elements * i // args.tensors
        for i in range(args.tensors)
    ]
    params = {f"{i:05d}": np.zeros(size, np.float32) for i, size in enumerate(sizes)}
    topology = {"num_shards": args.shards, "num_workers": args.workers, "replicas": args.replicas}
    with DistNadam(**topology, backend="ray", options=options).build(params) as optimizer:
        del params
        trainers = [Trainer.remote(optimizer, rank) for rank in range(args.workers)]
        shards = [address.pid for address in optimizer.shards.backend.addresses]  # type: ignore[attr-defined]
        sides = {
            "a shard": shards,
            "a worker": ray.get([trainer.pid.remote() for trainer in trainers]),
        }
        if args.replicas:
            sides["a standby"] = standbys_of(optimizer, args.shards, shards)
        before = {side: scheduled(pids) for side, pids in sides.items()}
        times = ray.get(
            [
                trainer.run.remote(args.mode, args.steps, rank)
                for rank, trainer in enumerate(trainers)
            ]
        )
        for side, pids in sides.items() if args.cpu else ():
            ran, waited = (
                1e-3 * (now - then) / len(pids) / args.steps
                for now, then in zip(scheduled(pids), before[side], strict=True)
            )
            print(
                f"{side}, a step: computes {ran:.0f} us, waits {waited:.0f} us for a core",
                file=sys.stderr,
            )
        if args.memory:
            total, store = memory_of([pid for pids in sides.values() for pid in pids])
            planned = args.elements * (16 + 4 * args.workers + 12 * args.replicas)
            used = total - store
            print(
                f"used {used / 1e9:.2f} GB of {planned / 1e9:.2f} GB planned: "
                f"{used / planned:.3f}; beside {store / 1e9:.2f} GB of Ray's object store, through "
                "which the parameters came",
                file=sys.stderr,
            )
    ray.shutdown()
    print(json.dumps(times[0]))


if __name__ == "__main__":
    main()
