"""What the plan's model says of runs that no machine here can hold: 1,000 workers on 200 hosts.

Simulated, not measured: stragglers, racks that share an uplink, a host lost every hour; beside ring
all-reduce and a single server by their formulas. It draws `benchmarks/scale.svg`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distnadam.planning.advice import best
from distnadam.planning.constants import TYPICAL
from distnadam.planning.planned_run import PlannedRun
from distnadam.planning.simulation import MEANS, Simulated, Surroundings, simulate

HOSTS = (1, 2, 4, 8, 16, 32, 64, 128, 200)
WORKERS_A_HOST = 5


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model, and what happens to its run."""

    title: str
    parameters: int
    around: Surroundings


SCENES = [
    Scene(
        title="10^6 parameters, 10 ms a gradient",
        parameters=10**6,
        around=Surroundings(gradient_s=0.01),
    ),
    Scene(title="10^8, 0.1 s a gradient", parameters=10**8, around=Surroundings()),
    Scene(
        title="10^8, stragglers (spread 0.3), a host lost every hour",
        parameters=10**8,
        around=Surroundings(spread=0.3, host_lost_every_s=3600.0),
    ),
    Scene(
        title="10^8, racks of 16 hosts behind 40 Gbit/s",
        parameters=10**8,
        around=Surroundings(rack_hosts=16),
    ),
]


def simulated(scene: Scene) -> Iterator[tuple[int, list[Simulated]]]:
    """Yield the number of workers, and what each means makes of it."""
    for hosts in HOSTS:
        run = PlannedRun(parameters=scene.parameters, hosts=hosts, workers_per_host=WORKERS_A_HOST)
        chosen, _ = best(run, TYPICAL)
        yield run.workers, simulate(chosen, TYPICAL, scene.around)


def main() -> None:
    """Print a table per scene, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(Path(__file__).parent / "scale.svg"))
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "distnadam", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True)
    for scene, axis in zip(SCENES, axes.flat, strict=True):
        table = Table("workers", *(f"{name}, ms a round" for name in MEANS), title=scene.title)
        rows = list(simulated(scene))
        for workers, found in rows:
            table.add_row(str(workers), *(f"{1e3 * each.round_s:.1f}" for each in found))
        Console(width=100).print(table)
        for index, name in enumerate(MEANS):
            points = [(workers, found[index].samples_per_s) for workers, found in rows]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(title=scene.title, xscale="log", yscale="log", ylabel="gradients a second")
        axis.title.set_fontsize(9)
        axis.grid(visible=True, alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("workers, 5 a host, cables of 10 Gbit/s")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
