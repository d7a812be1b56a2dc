"""Checkpoints of one state: ours beside raw files, torch and safetensors, on the same disk.

Each contender saves, or restores, the same params, m and v. All run once per round, in turn, after
a pause for the disk; the medians are reported. Writes are to new files, and reads are of files that
were flushed and dropped from the page cache. A virtual machine returns free memory to its host and
gets it back slowly, so the memory that a contender needs is touched just before it runs.
"""

import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distnadam import DistNadam

SHARDS = 2
PAUSE_S = 1.0
BACKED_BYTES = 2 * 10**9
"""More than the page cache and memory that any contender needs to read."""
Timed = Callable[[], float]
Contenders = dict[tuple[str, str], Timed]
"""What returns its own seconds, by what is measured and by name."""
BASES = {
    "save": "raw write and fsync",
    "stall": "one memory copy of the state",
    "restore": "raw read",
}


@dataclass(frozen=True)
class Setup:
    """The directory to write in, the arrays, and an optimizer that holds them."""

    root: Path
    state: dict[str, Any]
    optimizer: DistNadam


def measure(elements: int, rounds: int) -> tuple[list[dict[str, object]], list[str]]:
    """Return one row per contender, and a sentence for each that is not installed."""
    root = Path(tempfile.mkdtemp(prefix="distnadam-bench-"))
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(elements, dtype=np.float32) for name in ("params", "m", "v")}
    times: dict[tuple[str, str], list[float]] = {}
    missing: list[str] = []
    optimizer = DistNadam(num_shards=SHARDS, backend="local").build({"w": state["params"]})
    optimizer.set_weights([np.array(1), np.array(0.5), state["m"], np.abs(state["v"])])
    contenders: Contenders = {}
    setup = Setup(root, state, optimizer)
    for add in (add_raw, add_ours, add_safetensors, add_torch):
        try:
            add(contenders, setup)
        except ImportError as error:
            missing.append(f"{add.__name__.removeprefix('add_')}: {error}")
    try:
        for number in range(rounds + 1):
            for key, contender in contenders.items():
                time.sleep(PAUSE_S)
                seconds = contender()
                gc.collect()
                if number:
                    times.setdefault(key, []).append(seconds)
    finally:
        optimizer.close()
        shutil.rmtree(root)
    found = {key: statistics.median(seconds) for key, seconds in times.items()}
    gigabytes = 12 * elements / 1e9
    rows: list[dict[str, object]] = []
    for (what, name), seconds in found.items():
        base = found[what, BASES[what]]
        rows.append(
            {
                "what": what,
                "who": name,
                "ms": 1e3 * seconds,
                "gb_per_s": gigabytes / seconds,
                "of_base": base / seconds,
            }
        )
    return rows, missing


def add_raw(contenders: Contenders, setup: Setup) -> None:
    path = setup.root / "raw"
    kept = [np.ones_like(values) for values in setup.state.values()]

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for values in setup.state.values():
                view = memoryview(values).cast("B")
                while view:
                    view = view[file.write(view[: 1 << 20]) :]
            os.fsync(file.fileno())

    def read() -> None:
        room = [np.empty_like(values) for values in setup.state.values()]
        with open(path, "rb", buffering=0) as file:
            for values in room:
                view = memoryview(values).cast("B")
                while view:
                    view = view[file.readinto(view[: 1 << 20]) :]

    def copy() -> None:
        for source, target in zip(setup.state.values(), kept, strict=True):
            np.copyto(target, source)

    contenders["save", BASES["save"]] = lambda: timed(write, fresh=path)
    contenders["stall", BASES["stall"]] = lambda: timed(copy)
    contenders["restore", BASES["restore"]] = lambda: timed(read, drop=path)


def add_ours(contenders: Contenders, setup: Setup) -> None:
    path = setup.root / "ours"

    gradients = {"w": setup.state["m"]}

    def behind(*, step: bool) -> float:
        """Return the seconds of the call, or of the call and the step after it.

        From the latter the duration of a step without a save is subtracted.
        """
        remove(path)
        usual = timed(lambda: setup.optimizer.apply_gradients(gradients)) if step else 0.0
        began = time.perf_counter()
        saving: Any = setup.optimizer.save(path, wait=False)
        if step:
            setup.optimizer.apply_gradients(gradients)
        seconds = time.perf_counter() - began
        saving.result()
        return seconds - usual

    def restore(shards: int) -> None:
        DistNadam.restore(path, num_shards=shards, backend="local").close()

    contenders["save", "distnadam"] = lambda: timed(lambda: setup.optimizer.save(path), fresh=path)
    contenders["stall", "distnadam, wait=False: the call"] = lambda: behind(step=False)
    contenders["stall", "distnadam, wait=False: with a step at once"] = lambda: behind(step=True)
    for shards in (SHARDS, 3):
        name = f"distnadam, {SHARDS} -> {shards} shards"
        contenders["restore", name] = lambda shards=shards: timed(
            lambda: restore(shards), drop=path
        )  # type: ignore[misc]


def add_safetensors(contenders: Contenders, setup: Setup) -> None:
    from safetensors.numpy import load_file, save_file

    path = setup.root / "state.safetensors"
    contenders["save", "safetensors, no fsync"] = lambda: timed(
        lambda: save_file(setup.state, path), fresh=path
    )
    contenders["restore", "safetensors"] = lambda: timed(lambda: load_file(path), drop=path)


def add_torch(contenders: Contenders, setup: Setup) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    tensors = {name: torch.from_numpy(values) for name, values in setup.state.items()}
    path, many, behind = setup.root / "state.pt", setup.root / "dcp", setup.root / "dcp-async"

    def stall() -> float:
        remove(behind)
        began = time.perf_counter()
        saving = dcp.async_save(tensors, checkpoint_id=behind, no_dist=True)
        seconds = time.perf_counter() - began
        saving.result()
        return seconds

    def save() -> None:
        dcp.save(tensors, checkpoint_id=many, no_dist=True)

    def load() -> None:
        dcp.load(
            {name: torch.empty_like(tensor) for name, tensor in tensors.items()},
            checkpoint_id=many,
            no_dist=True,
        )

    contenders["save", "torch.save, no fsync"] = lambda: timed(
        lambda: torch.save(tensors, path), fresh=path
    )
    contenders["save", "torch.distributed.checkpoint"] = lambda: timed(save, fresh=many)
    contenders["stall", "torch.distributed.checkpoint, async_save"] = stall
    contenders["restore", "torch.load"] = lambda: timed(lambda: torch.load(path), drop=path)
    contenders["restore", "torch.distributed.checkpoint"] = lambda: timed(load, drop=many)


def timed(
    work: Callable[[], object], *, fresh: Path | None = None, drop: Path | None = None
) -> float:
    """Return the seconds that `work` takes.

    Args:
        work: what to time.
        fresh: a path to remove before.
        drop: a file or directory to drop from the page cache before.
    """
    if fresh is not None:
        remove(fresh)
    for file in [] if drop is None else [drop, *drop.rglob("*")]:
        if not file.is_file():
            continue
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if drop is not None:
        np.ones(BACKED_BYTES, np.uint8)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def report(
    rows: list[dict[str, object]], missing: list[str], elements: int, console: Console
) -> None:
    """Print the table."""
    table = Table(
        "",
        "who",
        "ms",
        "GB/s",
        "speed, of the raw one",
        title=f"checkpoints of {12 * elements / 1e6:.0f} MB",
    )
    for row in rows:
        table.add_row(
            str(row["what"]),
            str(row["who"]),
            f"{row['ms']:.0f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['of_base']:.2f}",
        )
    console.print(table)
    for sentence in missing:
        console.print(f"left out: {sentence}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=50_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found, absent = measure(args.elements, args.rounds)
    report(found, absent, args.elements, Console(width=110))
