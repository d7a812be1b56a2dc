"""A step over three hosts and cables of known speed, beside peers and the bytes alone.

The hosts are network namespaces of this machine, a shard on each. It needs root, iproute2 and, for
the peers, torch and mpi4py (the extra `bench`) and Open MPI (Debian's openmpi-bin). The peers:
torch's all-reduce over gloo with its NAdam, or DDP; the same with its ZeRO; MPI's all-reduce.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders.mpirun import is_installed, mpirun
from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not
from tests.hosts.program import Program

HOSTS = 3
WARM_UP = 3
STEPS = {10**5: 40, 10**6: 20, 10**7: 6}
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        elements: parameters.
        bits_per_s: of each cable, in each direction.
        workers: on each host.
        sums: whether ours sums the gradients of a host's workers before they leave it.
        dtype: of gradients and parameters on their way; None for float32.
        backward: whether gradients come of a backward pass, which takes as long as the bytes alone;
            torch's is DDP then.
    """

    elements: int
    bits_per_s: float = 1e9
    workers: int = 1
    sums: bool = False
    dtype: str | None = None
    backward: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is a step alone, in float32: what ZeRO and MPI are measured by."""
        return self.dtype is None and not self.backward

    @property
    def least_bytes(self) -> float:
        """What must cross each cable in each direction: a host's gradients, parameters back."""
        size = FLOAT32_BYTES if self.dtype is None else FLOAT32_BYTES // 2
        return 2 * (HOSTS - 1) / HOSTS * size * self.elements


CASES = [
    Case(elements=10**5),
    Case(elements=10**6),
    Case(elements=10**7),
    Case(elements=10**7, workers=2),
    Case(elements=10**7, workers=2, sums=True),
    Case(elements=10**7, bits_per_s=1e10),
    Case(elements=10**7, dtype="bfloat16"),
    Case(elements=10**7, backward=True),
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A step's median, and the most bytes of one step in one direction over one host's cable."""

    seconds: float
    num_bytes: float


class Hosts:
    """The cluster, and how contenders run on it."""

    def __init__(self, cluster: Cluster, case: Case) -> None:
        self.cluster = cluster
        self._case = case
        self._about: dict[str, Any] = {
            "elements": case.elements,
            "steps": STEPS[case.elements],
            "warm_up": WARM_UP,
            "dtype": case.dtype,
        }
        self._port = 29500
        self._kind = "backward_on_hosts" if case.backward else "on_hosts"
        if case.backward:
            alone_s = 8 * case.least_bytes / case.bits_per_s
            program = ("-m", "benchmarks.contenders.mlp", str(case.elements), str(alone_s))
            with_batch = cluster.python(cluster.hosts[0], *program)
            self._about["batch"] = with_batch.first("batch")["batch"]
            with_batch.finish()

    def ours(self, transport: str) -> Measured:
        """Measure ours, by a transport."""
        about = self._about | {
            "hosts": HOSTS,
            "workers": self._case.workers,
            "sums": self._case.sums,
            "transport": transport,
        }
        program = ("-m", f"benchmarks.contenders.ours_{self._kind}", json.dumps(about))
        return self._measure([self.cluster.python(self.cluster.hosts[0], *program)])

    def torch(self, *, zero: bool = False) -> Measured:
        """Measure torch over gloo; with `zero`, its optimizer's state is sharded."""
        self._port += 1
        hosts, size = self.cluster.hosts, HOSTS * self._case.workers
        env = {
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": str(self._port),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        programs = []
        for rank in range(size):
            about = self._about | {"rank": rank, "world_size": size, "zero": zero}
            program = ("-m", f"benchmarks.contenders.torch_{self._kind}", json.dumps(about))
            programs.append(self.cluster.python(hosts[rank // self._case.workers], *program, **env))
        return self._measure(programs)

    def mpi(self) -> Measured:
        """Measure Open MPI's all-reduce."""
        with tempfile.TemporaryDirectory() as directory:
            hosts, workers = self.cluster.hosts, self._case.workers
            return self._measure([mpirun(hosts, workers, self._about, Path(directory))])

    def _measure(self, programs: list[Program]) -> Measured:
        hosts = self.cluster.hosts
        for program in programs:
            program.first("warm")
        for host in hosts:
            host.shape(self._case.bits_per_s)
        before = [host.traffic() for host in hosts]
        for program in programs:
            program.tell("go on")
        seconds = programs[0].first("median_s")["median_s"]
        after = [host.traffic() for host in hosts]
        for host in hosts:
            host.unshape()
        for program in programs:
            program.tell("end")
        for program in programs:
            program.finish()
        moved = [
            now - then
            for at_end, at_begin in zip(after, before, strict=True)
            for now, then in zip(at_end, at_begin, strict=True)
        ]
        return Measured(seconds=seconds, num_bytes=max(moved) / self._about["steps"])


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=1e7, help="elements of the largest case")
    parser.add_argument("--objects", action="store_true", help="ours by Ray objects too")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    peers = ["gloo", "ZeRO"] if importlib.util.find_spec("torch") is not None else []
    if peers and is_installed():
        peers.append("MPI")
    names = ["ours", *(["by objects"] if args.objects else []), *peers]
    table = Table(title=f"ms per step, medians of {args.rounds} rounds, {HOSTS} hosts")
    for name in (
        *("elements", "Gbit/s", "workers a host", "sums", "dtype", "backward"),
        *names,
        *("bytes alone", "ours / gloo", "ours / bytes", "bytes / least"),
    ):
        table.add_column(name, justify="right")
    for case in CASES:
        if case.elements > args.most:
            continue
        resources = [{"CPU": float(case.workers), "shard": 1.0}] * HOSTS
        with (
            tempfile.TemporaryDirectory() as directory,
            Cluster(Path(directory), resources) as cluster,
        ):
            hosts = Hosts(cluster, case)
            measure = {
                "ours": partial(hosts.ours, "auto"),
                "by objects": partial(hosts.ours, "objects"),
                "gloo": hosts.torch,
                "ZeRO": partial(hosts.torch, zero=True),
                "MPI": hosts.mpi,
            }
            able = [name for name in names if case.is_plain or name not in ("ZeRO", "MPI")]
            rounds = [{name: measure[name]() for name in able} for _ in range(args.rounds)]
        ms = {name: 1e3 * statistics.median(each[name].seconds for each in rounds) for name in able}
        moved = statistics.median(each["ours"].num_bytes for each in rounds)
        least, ours = case.least_bytes, ms["ours"]
        alone = 8e3 * least / case.bits_per_s
        print(case, {name: round(each, 2) for name, each in ms.items()}, file=sys.stderr)
        table.add_row(
            f"{case.elements:.0e}",
            f"{case.bits_per_s / 1e9:g}",
            str(case.workers),
            "yes" if case.sums else "",
            case.dtype or "float32",
            "yes" if case.backward else "",
            *(f"{ms[name]:.1f}" if name in ms else "-" for name in names),
            f"{alone:.1f}",
            f"{ours / ms['gloo']:.2f}" if "gloo" in ms else "-",
            f"{ours / alone:.2f}",
            f"{moved / least:.2f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
