"""Open MPI over hosts that are network namespaces: what stands for ssh enters one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.hosts.cluster import ROOT
from tests.hosts.network import Host
from tests.hosts.program import Program

_AGENT = """#!/bin/sh
case $1 in
{cases}
esac
host=$1
shift
exec nsenter -t $holder -n unshare --uts sh -c "hostname mpi-$holder; $*"
"""
_BY_TCP = {
    "btl": "tcp,self",
    "pml": "ob1",
    "btl_tcp_if_include": "eth0",
    "oob_tcp_if_include": "eth0",
}


def is_installed() -> bool:
    """Whether Open MPI (Debian's openmpi-bin) and mpi4py are here."""
    return shutil.which("mpirun") is not None and find_spec("mpi4py") is not None


def mpirun(
    hosts: Sequence[Host], workers: int, about: Mapping[str, Any], directory: Path
) -> Program:
    """Start `mpi_on_hosts` with so many ranks on each host, consecutive ones together.

    Args:
        directory: for the program that stands for ssh.
    """
    agent = directory / "agent"
    cases = "\n".join(f"{host.address}) holder={host.holder} ;;" for host in hosts)
    agent.write_text(_AGENT.format(cases=cases))
    agent.chmod(0o755)
    settings = _BY_TCP | {"plm_rsh_agent": str(agent)}
    command = [
        *("nsenter", "-t", str(hosts[0].holder), "-n"),
        *("unshare", "--uts", "sh", "-c", 'hostname mpi-head; exec "$@"', "sh"),
        *("mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
        *("--host", ",".join(f"{host.address}:{workers}" for host in hosts)),
        *(word for name, value in settings.items() for word in ("--mca", name, value)),
        *("-x", "PYTHONPATH", sys.executable, "-m", "benchmarks.contenders.mpi_on_hosts"),
        json.dumps(about),
    ]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return Program(subprocess.Popen(command, env=env, cwd=ROOT, **pipes))
