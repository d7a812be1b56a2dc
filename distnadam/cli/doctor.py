"""The command `doctor`: what would run on this host, and what is wrong with it."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import click
from click.core import ParameterSource
from rich.table import Table

from distnadam.backends import factory
from distnadam.checks import check_ports
from distnadam.cli.counts import COUNT
from distnadam.cli.group import JSON, echo_json, exit_on_error, main, plain_console
from distnadam.cli.measuring import measure_constants
from distnadam.cli.planned_run_options import NAMES, planned_run, planned_run_options
from distnadam.cli.running import joined
from distnadam.errors import InsufficientResources, KernelError
from distnadam.extras import how_to_install
from distnadam.nadam.kernels import fused_installed, make_stepper
from distnadam.planning import room
from distnadam.transport.available_memory import available_bytes
from distnadam.transport.link import Links
from distnadam.transport.shared_memory import why_not_shared
from distnadam.versions import CORE_PACKAGES, installed_version

_OPTIONAL_PACKAGES = ("torch", "jax", "llvmlite", "scikit-learn", "matplotlib")
_SMALL_SHM_BYTES = 1 << 30


@dataclass
class Diagnosis:
    """What `diagnose` found; `problems` holds a sentence for each thing that is wrong.

    `links` are the ways between the nodes of a cluster, if those were examined.
    """

    python: str
    versions: dict[str, str | None]
    cpus: int
    ray_address: str | None
    ray_auth_mode: str | None
    shm_bytes: int | None
    shm_free_bytes: int | None
    kernel: str
    transport: str
    problems: list[str] = field(default_factory=list)
    links: Links | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Examine this host and its environment, without connecting to anything."""
    versions = {
        package: installed_version(package) for package in (*CORE_PACKAGES, *_OPTIONAL_PACKAGES)
    }
    try:
        shm = shutil.disk_usage("/dev/shm")
    except OSError:  # there is none, or not for us
        shm = None
    cpus = len(os.sched_getaffinity(0))
    found = Diagnosis(
        python=platform.python_version(),
        versions=versions,
        cpus=cpus,
        ray_address=os.environ.get("RAY_ADDRESS"),
        ray_auth_mode=os.environ.get("RAY_AUTH_MODE"),
        shm_bytes=shm.total if shm else None,
        shm_free_bytes=shm.free if shm else None,
        kernel=f"{_kernel()}, up to {cpus} thread(s) per shard where local",
        transport=_transport(),
    )
    if versions["ray"] is None:
        found.problems.append(
            f"ray is not installed: only backend='local' works; {how_to_install('ray')}"
        )
    if shm is None:
        found.problems.append(
            "/dev/shm does not exist: Ray's object store will be on disk; mount a tmpfs there"
        )
    elif shm.total < _SMALL_SHM_BYTES:
        found.problems.append(
            f"/dev/shm has only {shm.total >> 20} MiB: Ray's object store will be slow; in a "
            "container, give --shm-size"
        )
    if found.ray_address and found.ray_auth_mode is None:
        found.problems.append(
            "RAY_ADDRESS is set but RAY_AUTH_MODE is not: set it to the cluster's mode, token or "
            "disabled"
        )
    if found.ray_address and found.ray_auth_mode == "disabled":
        found.problems.append(
            "RAY_AUTH_MODE is disabled: anyone who reaches the cluster's ports can run code on it"
        )
    return found


def _kernel() -> str:
    if not fused_installed():
        return f"NumPy, in blocks ({how_to_install('fused')} for the compiled one)"
    try:
        make_stepper("fused", "float32").close()
    except (KernelError, MemoryError) as error:
        return f"NumPy, in blocks: {error}"
    return "fused (llvmlite is installed)"


def _transport() -> str:
    """Describe the transport within this host, and between hosts in general."""
    if (why_not := why_not_shared()) is not None:
        return (
            f"Ray objects between processes of one Ray node, as shared memory does not work here: "
            f"{why_not}; TCP between nodes"
        )
    free = f"{available_bytes() >> 20} MiB are free for it"
    return (
        f"shared memory between processes of one Ray node ({free}), TCP between nodes; this "
        "process's memory where local"
    )


@main.command()
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Examine the Ray cluster with that head too: which way leads from node to node.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Measure the way from here to each HOST of the cluster, by default to all others.",
)
@click.option(
    "--save",
    metavar="FILE",
    help="With --measure: measure all nodes at once too, and write what `plan --constants` reads.",
)
@click.option(
    "--port-range",
    type=(int, int),
    metavar="FIRST LAST",
    help="The ports to try: those of Options(port_range=...).  [default: any]",
)
@click.option(
    "--parameters",
    type=COUNT,
    help="Say whether each host has the memory for its part of so large a model, with the options "
    "below.",
)
@planned_run_options(otherwise=("one on each host", "1"))
@JSON
def doctor(
    hosts: tuple[str, ...],
    address: str | None,
    *,
    measure: bool,
    save: str | None,
    port_range: tuple[int, int] | None,
    parameters: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what would run here: versions, Ray, shared memory, kernel, transport.

    With --address or --measure, join the Ray cluster (RAY_ADDRESS by default) and try the way from
    each node to each other one. Exit with 1 if something is wrong.
    """
    if hosts and not measure:
        raise click.UsageError("HOST is for --measure")
    if save is not None and not measure:
        raise click.UsageError("--save is for --measure")
    asked = click.get_current_context().get_parameter_source
    if parameters is None and any(asked(name) is not ParameterSource.DEFAULT for name in NAMES):
        raise click.UsageError("how a model is distributed goes with --parameters")
    found = diagnose()
    if measure or address is not None:
        with exit_on_error():
            ports = None if port_range is None else check_ports(port_range)
            with joined(address):
                found.links = factory.examine(ports, hosts if measure else None)
                if save is not None:
                    measure_constants(ports).save(save)
        found.problems += found.links.problems
    if parameters is not None:
        with exit_on_error():
            found.problems += _too_small(found, parameters, given)
    if as_json:
        echo_json(found.to_dict())
    else:
        _print(found)
    if found.problems:
        sys.exit(1)


def _too_small(found: Diagnosis, parameters: int, given: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each host without the memory for its part of a model."""
    hosts = {"this host": available_bytes()} if found.links is None else found.links.memory
    run = planned_run(given, parameters=parameters, hosts=len(hosts))
    for host, available in hosts.items():
        try:
            room.check(host, available, room.of_host(run))
        except InsufficientResources as error:
            yield str(error)


def _print(found: Diagnosis) -> None:
    table = Table(show_header=False)
    for key, value in found.to_dict().items():
        if key == "versions":
            for package, version in value.items():
                table.add_row(package, version or "not installed")
        elif key not in ("problems", "links"):
            table.add_row(key.replace("_", " "), "not set" if value is None else str(value))
    plain_console().print(table)
    if found.links is not None:
        plain_console().print(*_tables(found.links))
    for problem in found.problems:
        click.echo(f"problem: {problem}", err=True)


def _tables(links: Links) -> Iterator[Table]:
    """Yield which nodes are reached from which one how, and what was measured, if anything."""
    ways = Table("from", "by", "to", "why", title="between the nodes")
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for way in links.ways:
        grouped.setdefault((way.sender, way.carrier, way.why), []).append(way.receiver)
    for (sender, carrier, why), receivers in grouped.items():
        to = "itself" if receivers == [sender] else ", ".join(receivers)
        ways.add_row(sender, carrier, to, why)
    yield ways
    if not links.measured:
        return
    headings = ("to", "Gbit/s there", "Gbit/s back", "round trip ms", "congestion control", "by")
    measured = Table(*headings, title="measured from here")
    for each in links.measured:
        speeds = ["", "", ""]
        if (link := each.link) is not None:
            speeds = [
                f"{8e-9 * link.sent_bytes_per_s:.2f}",
                f"{8e-9 * link.received_bytes_per_s:.2f}",
                f"{1e3 * link.round_trip_s:.2f}",
            ]
        here, there = each.congestion
        control = here if here == there else f"{here} here, {there} there"
        by = "" if each.way is None else f"{each.way.carrier}: {each.why_not or each.way.why}"
        measured.add_row(each.host, *speeds, control, by)
    yield measured
