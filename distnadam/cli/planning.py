"""The command `plan`: what a run needs, how long its steps take, and what bounds them."""

import dataclasses
import re
from typing import Any

import click
from rich.table import Table

from distnadam.cli.counts import COUNT
from distnadam.cli.group import JSON, echo_json, exit_on_error, main, plain_console
from distnadam.cli.planned_run_options import planned_run, planned_run_options
from distnadam.planning import memory, peers, traffic
from distnadam.planning.advice import best
from distnadam.planning.constants import TYPICAL, Constants
from distnadam.planning.planned_run import PlannedRun
from distnadam.planning.simulation import Surroundings, simulate
from distnadam.planning.step_time import StepTime, step_time

_LINK = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)(bit|B)(?:/s)?")
_FACTOR = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_NODES = {
    "shards": memory.shard_node,
    "workers": memory.worker_node,
    "shards and workers": memory.shared_node,
    "head": memory.head_node,
}


class _Speed(click.ParamType[float]):
    """A cable's speed, such as 10Gbit/s or 1.2GB/s, as bytes per second."""

    name = "speed"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Return the bytes per second."""
        if isinstance(value, float):
            return value
        found = _LINK.fullmatch(value)
        speed = 0.0
        if found is not None:
            speed = float(found[1]) * _FACTOR[found[2]] / (8 if found[3] == "bit" else 1)
        if speed <= 0:
            self.fail(f"expected a speed such as 10Gbit/s or 1.2GB/s, got {value!r}", param, ctx)
        return speed


@main.command()
@click.option("--parameters", type=COUNT, required=True, help="Elements of the model, 1e9.")
@click.option("--hosts", type=COUNT, default=1, help="Hosts that have workers.  [default: 1]")
@click.option(
    "--shard-hosts",
    type=click.IntRange(0),
    default=0,
    help="Hosts for shards alone.  [default: 0, shards lie beside workers]",
)
@planned_run_options(otherwise=("what is best", "what is best"))
@click.option("--views", is_flag=True, help="Workers write gradients in place, and copy nothing.")
@click.option(
    "--link", type=_Speed(), metavar="SPEED", help="Of each cable, 10Gbit/s.  [default: measured]"
)
@click.option(
    "--constants",
    metavar="FILE",
    help="What `doctor --measure --save FILE` found.  [default: those of a typical host]",
)
@click.option(
    "--gradient-seconds",
    type=click.FloatRange(0),
    default=0.0,
    help="Seconds in which a worker computes its gradient, to compare by.  [default: 0]",
)
@JSON
def plan(
    *,
    parameters: int,
    hosts: int,
    shard_hosts: int,
    views: bool,
    link: float | None,
    constants: str | None,
    gradient_seconds: float,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what a run needs before it runs: memory, bytes, time by phase, and what bounds it.

    Without --shards and --sum-group, say which are best.
    """
    with exit_on_error():
        known = TYPICAL if constants is None else Constants.load(constants)
        if link is not None:
            known = dataclasses.replace(known, link_bytes_per_s=link)
        run = planned_run(given, parameters=parameters, hosts=hosts, shard_hosts=shard_hosts)
        fastest, _ = best(run, known, views=views)
        fixed = {name: given[name] for name in ("shards", "sum_group") if given[name] is not None}
        fastest = dataclasses.replace(fastest, **fixed)
        time = step_time(fastest, known, views=views)
    around = Surroundings(gradient_s=max(gradient_seconds, 1e-9), spread=0.0)
    others = simulate(fastest, known, around)
    if as_json:
        echo_json(_record(fastest, known, time))
        return
    measured = "a typical host" if constants is None else constants
    console = plain_console()
    console.print(
        f"{fastest.workers} worker(s) on {fastest.hosts} host(s), {fastest.num_shards} shard(s), "
        f"sum_group={fastest.sum_group}; constants of {measured}"
    )
    traffic = _traffic_table(fastest, known)
    console.print(_step_table(time), *([traffic] if traffic.rows else []), _node_table(fastest))
    longest = time.longest
    console.print(
        f"a step takes {1e3 * time.seconds:.2f} ms; longest is {longest.name}, bound by "
        f"{longest.bound}: {_remedy(longest.name, longest.bound, fastest)}"
    )
    console.print(
        "in a second, with gradients of "
        f"{gradient_seconds:g} s: "
        + ", ".join(f"{1 / each.round_s:.1f} rounds by {each.name}" for each in others)
    )


def _record(run: PlannedRun, known: Constants, time: StepTime) -> dict[str, Any]:
    return {
        "shards": run.num_shards,
        "sum_group": run.sum_group,
        "step_s": time.seconds,
        "phases": {phase.name: dataclasses.asdict(phase) for phase in time.phases},
        "ring_all_reduce_s": peers.ring_all_reduce_s(run, known),
        "one_server_s": peers.single_server_s(run, known),
        "gradients": dataclasses.asdict(traffic.gradients(run)),
        "parameters": dataclasses.asdict(traffic.parameters(run)),
        "nodes": {kind: dataclasses.asdict(size(run)) for kind, size in _NODES.items()},
    }


def _step_table(time: StepTime) -> Table:
    table = Table("phase", "ms", "share", "bound by", title="a step")
    for phase in time.phases:
        if phase.seconds:
            share = f"{phase.seconds / time.seconds:.0%}"
            table.add_row(phase.name, f"{1e3 * phase.seconds:.2f}", share, phase.bound)
    return table


def _traffic_table(run: PlannedRun, known: Constants) -> Table:
    speed = f"{8e-9 * known.link_bytes_per_s:g} Gbit/s"
    title = f"MB of a step at the busiest host, over a cable of {speed}"
    table = Table("what", "sent", "received", title=title)
    for what, moved in (
        ("gradients", traffic.gradients(run)),
        ("parameters", traffic.parameters(run)),
        ("to standbys", traffic.replication(run)),
    ):
        if moved.in_all:
            table.add_row(what, f"{moved.sent / 1e6:.1f}", f"{moved.received / 1e6:.1f}")
    return table


def _node_table(run: PlannedRun) -> Table:
    table = Table("node with", "/dev/shm", "memory", "--object-store-memory", title="memory")
    for kind, size in _NODES.items():
        node = size(run)
        sizes = (f"{each // memory.MIB} Mi" for each in (node.shm, node.memory))
        table.add_row(kind, *sizes, str(node.store))
    return table


def _remedy(phase: str, bound: str, run: PlannedRun) -> str:
    """Return what would make a phase shorter, in words."""
    if bound == "cable":
        halved = "" if run.half_parameters else " or bfloat16 (--dtype) halves the bytes,"
        summed = run.workers_per_host > run.sum_group
        grouped = f" --sum-group {run.workers_per_host} sums a host's gradients," if summed else ""
        return f"a faster cable,{halved}{grouped} or fewer steps with larger batches"
    if phase == "turn":
        return "the model is so small that what a round costs counts; take larger batches"
    if phase == "fill":
        return "views (--views) copy nothing"
    return "more cores on each host, or more hosts"
