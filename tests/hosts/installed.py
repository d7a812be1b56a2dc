"""Hosts that `cluster.sh` installs: what it puts on one is that host's alone, and programs stand in
for ssh, sudo, systemd and a package index.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from tests.hosts.network import Host, Network

ROOT = Path(__file__).parent.parent.parent
_OWN = ("/etc", "/opt", "/var/lib")
_SETTINGS = {"OBJECT_STORE_BYTES=": "100000000", "RAY_DASHBOARD=": "false"}
_STANDINS = {
    # one host's shell, as root
    "ssh": 'shift 2; host=$1; shift\nexec nsenter -t "$(cat "$SITE/$host")" -n -m -p -- sh -c "$*"',
    "sudo": 'exec "$@"',
    "id": "echo 642",
    "install": 'exec /usr/bin/install $(echo "$@" | sed "s/-o distnadam//")',
    "systemctl": f'PYTHONPATH={ROOT} exec {sys.executable} -m tests.hosts.systemctl "$@"',
    "wheel": 'while [ "$1" != --wheel-dir ]; do shift; done\nmkdir -p "$2" && cp "$WHEEL" "$2"',
    # an environment that has all packages but ours from this one
    "python3": f"""case "$*" in
"-m venv "*)
    {sys.executable} -m venv --without-pip "$3"
    for packages in "$3"/lib/python3.*/site-packages; do
        echo {sysconfig.get_path("purelib")} > "$packages/others.pth"
    done
    printf '#!%s\\nfrom ray.scripts.scripts import main\\nmain()\\n' "$3/bin/python" > "$3/bin/ray"
    chmod +x "$3/bin/ray" ;;
*) exec {sys.executable} "$@" ;;
esac""",
}


def wheel(directory: Path, version: str, *, importable: bool = True) -> Path:
    """Write a wheel of this tree that says to be of a version."""
    path = directory / f"distnadam-{version}-py3-none-any.whl"
    about, now = f"distnadam-{version}.dist-info", distribution("distnadam")
    texts = {
        "METADATA": (now.read_text("METADATA") or "").replace(
            f"\nVersion: {now.version}\n", f"\nVersion: {version}\n"
        ),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": now.read_text("entry_points.txt") or "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for source in sorted((ROOT / "distnadam").rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                text = source.read_bytes()
                if not importable and source.parent.name + source.name == "distnadam__init__.py":
                    text = b"raise ImportError('broken')\n"
                archive.writestr(str(source.relative_to(ROOT)), text)
        for name, text in texts.items():
            archive.writestr(f"{about}/{name}", text)
        record = "".join(f"{name},,\n" for name in {*archive.namelist(), f"{about}/RECORD"})
        archive.writestr(f"{about}/RECORD", record)
    return path


class InstalledHosts:
    """Hosts that know nothing yet, and a copy of deploy/hosts to install them from.

    Args:
        directory: for all files.
        network: where they are.
        count: how many.
    """

    def __init__(self, directory: Path, network: Network, count: int) -> None:
        self._copy = directory / "copy/deploy/hosts"
        shutil.copytree(ROOT / "deploy/hosts", self._copy, ignore=shutil.ignore_patterns("token"))
        shutil.copy(ROOT / "constraints.txt", directory / "copy")
        settings = self._copy / "ray.env"
        lines = settings.read_text().splitlines()
        for begin, value in _SETTINGS.items():
            lines = [begin + value if line.startswith(begin) else line for line in lines]
        settings.write_text("\n".join(lines) + "\n")
        site = directory / "site"
        site.mkdir()
        for name, text in _STANDINS.items():
            (site / name).write_text(f"#!/bin/sh\n{text}\n")
            (site / name).chmod(0o755)
        # not this tree's package, which a path would bring in before the one that is installed
        self._env = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))
        } | {
            "SITE": str(site),
            "PATH": f"{site}:{os.environ['PATH']}",
            "PYTHON": str(site / "wheel"),
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.hosts = [network.add_host() for _ in range(count)]
        for host in self.hosts:
            (site / host.address).write_text(str(host.holder))
            for number, path in enumerate(_OWN):
                upper = directory / f"own-{host.number}-{number}"
                (upper / "new").mkdir(parents=True)
                (upper / "work").mkdir()
                how = f"lowerdir={path},upperdir={upper}/new,workdir={upper}/work"
                self.on(host, "mount", "-t", "overlay", "overlay", "-o", how, path)
            self.on(host, "mkdir", "-p", "/etc/systemd/system", "/var/lib/distnadam")

    def on(self, host: Host, *command: str) -> str:
        """Run a command on a host; return what it prints."""
        done = subprocess.run(
            host.command(*command), env=self._env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def cluster(self, verb: str, wheel: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run `cluster.sh` on all hosts, with that wheel as what the copy is packed into."""
        addresses = [host.address for host in self.hosts]
        return subprocess.run(
            [self._copy / "cluster.sh", verb, *addresses],
            env=self._env | {"WHEEL": str(wheel)},
            capture_output=True,
            text=True,
            timeout=300,
        )
