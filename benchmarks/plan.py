"""What `distnadam plan` says beside what is measured, on three hosts, at six points.

The hosts are network namespaces of this machine, as in `hosts.py`. `doctor --measure --save` takes
the constants over the very cables that a point is measured over.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.hosts import HOSTS, Case, Hosts
from distnadam.planning.constants import Constants
from distnadam.planning.planned_run import PlannedRun
from distnadam.planning.step_time import StepTime, step_time
from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not

POINTS = [
    Case(elements=10**6),
    Case(elements=10**6, workers=2, sums=True),
    Case(elements=10**6, bits_per_s=1e10),
    Case(elements=10**7),
    Case(elements=10**7, workers=2, sums=True),
    Case(elements=10**7, bits_per_s=1e10),
]


def constants_of(cluster: Cluster, case: Case, directory: Path) -> Constants:
    """Return what `doctor` measures over cables of a case's speed."""
    path = directory / "constants.json"
    for host in cluster.hosts:
        host.shape(case.bits_per_s)
    arguments = ("doctor", "--json", "--measure", "--save", str(path))
    program = cluster.python(cluster.hosts[0], "-m", "distnadam", *arguments)
    program.first("links", also="problems")
    program.close()
    for host in cluster.hosts:
        host.unshape()
    return Constants.load(str(path))


def planned(case: Case, constants: Constants) -> StepTime:
    """Return the step that the plan expects."""
    run = PlannedRun(
        parameters=case.elements,
        hosts=HOSTS,
        workers_per_host=case.workers,
        sum_group=case.workers if case.sums else 1,
    )
    return step_time(run, constants, views=True)


def main() -> None:
    """Print one line per point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="*", help="points, from 0")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    headings = ("elements", "Gbit/s", "workers a host", "planned", "measured", "planned / measured")
    table = Table(*headings, "phases", title=f"ms per step, {HOSTS} hosts")
    for number, case in enumerate(POINTS):
        if args.only and number not in args.only:
            continue
        resources = [{"CPU": float(case.workers), "shard": 1.0}] * HOSTS
        with (
            tempfile.TemporaryDirectory() as directory,
            Cluster(Path(directory), resources) as cluster,
        ):
            constants = constants_of(cluster, case, Path(directory))
            hosts = Hosts(cluster, case)
            found = statistics.median(hosts.ours("auto").seconds for _ in range(args.rounds))
        expected = planned(case, constants)
        print(json.dumps({"point": number, "measured": found, "constants": vars(constants)}))
        phases = (f"{each.name} {1e3 * each.seconds:.1f}" for each in expected.phases)
        table.add_row(
            f"{case.elements:.0e}",
            f"{case.bits_per_s / 1e9:g}",
            str(case.workers),
            f"{1e3 * expected.seconds:.1f}",
            f"{1e3 * found:.1f}",
            f"{expected.seconds / found:.2f}",
            ", ".join(phases),
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
