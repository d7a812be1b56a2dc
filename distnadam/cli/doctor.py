"""The command `doctor`: what would run on this host, and what is wrong with it."""

import os
import platform
import secrets
import shutil
import socket
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import click
from rich.table import Table

from distnadam.cli.group import JSON, echo_json, main, plain_console
from distnadam.errors import ArenaError, KernelError
from distnadam.nadam.kernels import fused_installed, make_stepper
from distnadam.transport.shared_memory import Arena, available_bytes
from distnadam.versions import CORE_PACKAGES, installed_version

_OPTIONAL_PACKAGES = ("torch", "jax", "numba", "scikit-learn", "matplotlib")
_SMALL_SHM_BYTES = 1 << 30


@dataclass
class Diagnosis:
    """What `diagnose` found; `problems` holds a sentence for each thing that is wrong."""

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
        found.problems.append("ray is not installed: only backend='local' works; pip install ray")
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
        return "NumPy, in blocks (pip install 'distnadam[fused]' for the compiled one)"
    try:
        make_stepper("fused", "float32").close()
    except (KernelError, MemoryError) as error:
        return f"NumPy, in blocks: {error}"
    return "fused (numba is installed)"


def _transport() -> str:
    """Describe the transport, after trying sealed shared memory and an abstract Unix socket."""
    try:
        Arena.create({"float32": 1})
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"\0distnadam-{secrets.token_hex(8)}")
    except (ArenaError, OSError, AttributeError) as error:
        return f"Ray objects between processes: shared memory does not work here: {error}"
    free = f"{available_bytes() >> 20} MiB are free for it"
    return (
        f"shared memory between processes of one Ray node ({free}), TCP between nodes; this "
        "process's memory where local"
    )


@main.command()
@JSON
def doctor(*, as_json: bool) -> None:
    """Show what would run here: versions, Ray, shared memory, kernel, transport.

    Exit with 1 if something is wrong.
    """
    found = diagnose()
    if as_json:
        echo_json(found.to_dict())
    else:
        table = Table(show_header=False)
        for key, value in found.to_dict().items():
            if key == "versions":
                for package, version in value.items():
                    table.add_row(package, version or "not installed")
            elif key != "problems":
                table.add_row(key.replace("_", " "), "not set" if value is None else str(value))
        plain_console().print(table)
        for problem in found.problems:
            click.echo(f"problem: {problem}", err=True)
    if found.problems:
        sys.exit(1)
