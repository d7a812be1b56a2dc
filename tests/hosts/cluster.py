"""A Ray of several hosts, whose nodes start as the units of deploy/hosts do, behind a token.

The command and environment of a node are read from the units and from `ray.env`, with the hosts'
addresses where `cluster.sh` puts them. The units' user, limits and protection need systemd and are
left out.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.deploy.units import Unit, assignments
from tests.hosts.network import Host, Network
from tests.hosts.program import Program

ROOT = Path(__file__).parent.parent.parent
UNITS = ROOT / "deploy" / "hosts"
PROGRAMS = Path(sys.executable).parent
RAY = str(PROGRAMS / "ray")
PORT = 6379
SOON = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""How the head finds out soon that a host is gone: after some 3 s, where Ray's own choice is up to
a minute.
"""
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where systemd looks for programs for a unit that says nothing of it."""
_STORE_BYTES = 400 * 2**20
ONE_EACH = [
    {"CPU": 1, "shard": 1},
    {"CPU": 1, "shard": 1, "away": 1},
    {"CPU": 1, "shard": 1},
]
"""Room for one worker and one shard on each host; "away" is on another than the driver's."""
ALL_ON_ANY = [{"CPU": 2}, *[{"CPU": 2, "shard": 9, "place": 2}] * 2]
"""Shards keep off the head, which must not be lost, so that any other host that is lost takes some
along; each of the others has room for all, or as "place" for two.
"""
_TRIES = 3
_RESTART_S = 5.0
"""Seconds between two looks for nodes that have ended by themselves."""


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """One line of `distnadam`'s log: its time, host, process and text."""

    time: float
    host: str
    pid: int
    text: str


class Cluster:
    """Hosts and their Ray nodes, the first the head; a context manager.

    Args:
        directory: for the hosts' own files, the token, and the logs.
        resources: Ray resources of each host, the head's first, CPUs among them as "CPU".
        env: further environment of every node and program.
        dashboard: whether the head has one, and so accepts jobs, on its own address alone.
    """

    def __init__(
        self,
        directory: Path,
        resources: list[dict[str, float]],
        *,
        env: Mapping[str, str] | None = None,
        dashboard: bool = False,
    ) -> None:
        self._token = directory / "token"
        self._logs = directory / "logs"
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)
        self._logs.mkdir()
        self.env = {
            key: value for key, value in os.environ.items() if not key.startswith("RAY_")
        } | dict(env or {})
        self.env |= {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.env |= {
            "PYTHONPATH": f"{ROOT / 'tests/hosts/site'}:{ROOT}",
            "DISTNADAM_TEST_LOGS": str(self._logs),
        }
        self._nodes: dict[int, subprocess.Popen[str]] = {}
        self._programs: list[Program] = []
        self._dashboard = dashboard
        self._first = len(resources)
        self.struck: set[Host] = set()
        self._resources: dict[int, dict[str, float]] = {}
        self._acting = threading.RLock()  # on a host's node
        self.network = Network(directory)
        try:
            self.add(resources[0])
            self.add(*resources[1:])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def hosts(self) -> list[Host]:
        """Every host, the head's first."""
        return self.network.hosts

    @property
    def address(self) -> str:
        """The head's address, for RAY_ADDRESS."""
        return f"{self.hosts[0].address}:{PORT}"

    def add(self, *resources: dict[str, float]) -> list[Host]:
        """Add hosts and wait until they have joined."""
        new = [self.network.add_host() for _ in resources]
        for host, has in zip(new, resources, strict=True):
            self._resources[host.number] = has
            self._begin(host)
        for host in new:
            self._await(host)
        return new

    def kill(self, host: Host, how: str) -> float:
        """Call a host's method by name; return when."""
        with self._acting:
            self.struck.add(host)
            moment = time.time()
            getattr(host, how)()
            return moment

    def signal(self, host: Host, number: int) -> None:
        """Send the host's node a signal, as systemd does that stops its unit."""
        self.struck.add(host)
        pid = self._nodes[host.number].pid
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[0])  # what enters the host's namespaces has the node as a child
            if b"start\0--block" in Path(f"/proc/{pid}/cmdline").read_bytes():
                break
        os.kill(pid, number)

    def host_at(self, address: str) -> Host:
        """Return the host of an address."""
        return next(host for host in self.hosts if host.address == address)

    def restart(self, host: Host) -> None:
        """Restore a host's link, and start its node again in place of any rest of the last one."""
        with self._acting:
            self.struck.discard(host)
            host.kill()
            self._nodes[host.number].communicate()
            host.unshape()
            host.mend()
            self._begin(host)
            self._await(host)

    @contextmanager
    def restarting_nodes(self) -> Iterator[None]:
        """Start nodes again that end by themselves, as their units have systemd do: Ray's head may
        take a fault that was to pass for a host's death, or a node that is back soon for the dead
        one.
        """
        is_over, errors = threading.Event(), list[Exception]()

        def watch() -> None:
            while not (is_over.wait(_RESTART_S) or errors):
                with self._acting:
                    for host in self.hosts[1:]:
                        if host not in self.struck and self.ended(host):
                            try:
                                self.restart(host)
                            except Exception as error:
                                errors.append(error)

        thread = threading.Thread(target=watch, name="restarting nodes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
        assert not errors, errors

    def is_whole(self) -> bool:
        """End the hosts that joined later, and return whether the cluster is as it was, for another
        test.

        It is not where a test that failed has left programs, nor where a host was struck: of one
        that is back at the same ports before Ray's head has missed it, the head takes the new node
        for dead, now and then.
        """
        for host in self.hosts[self._first :]:
            host.kill()
            self._nodes.pop(host.number).communicate()
            self.hosts.remove(host)
            self.struck.discard(host)
        is_left = any(program.runs for program in self._programs)
        return not (is_left or self.struck or any(map(self.ended, self.hosts)))

    def ended(self, host: Host) -> bool:
        """Return whether a host's node has ended."""
        return self._nodes[host.number].poll() is not None

    def _settings(self, host: Host) -> str:
        """Return the host's `ray.env`, filled in as `cluster.sh` and its administrator do."""
        filled = {
            "HEAD_ADDRESS": self.hosts[0].address,
            "NODE_ADDRESS": host.address,
            "RAY_AUTH_TOKEN_PATH": str(self._token),
        }
        filled |= {
            "OBJECT_STORE_BYTES": str(_STORE_BYTES),
            "RAY_DASHBOARD": str(self._dashboard).lower(),
        }
        text = (UNITS / "ray.env").read_text()
        for name, value in filled.items():
            text, times = re.subn(f"^{name}=.*", f"{name}={value}", text, flags=re.M)
            assert times == 1, f"ray.env has {name} {times} times"
        return text

    def _begin(self, host: Host) -> None:
        head, has = host.number == 1, dict(self._resources[host.number])
        unit = Unit.of_hosts(UNITS / f"distnadam-{'head' if head else 'node'}.service", PROGRAMS)
        given = unit.environment({"/etc/distnadam/ray.env": self._settings(host)})
        # a part of this machine's resources
        room = [f"--num-cpus={has.pop('CPU', 1):.0f}", f"--resources={json.dumps(has)}"]
        command = host.command(*unit.command(given), *room)
        env = self._env(host) | {"PATH": _SYSTEM_PATH} | given | (SOON if head else {})
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        self._nodes[host.number] = subprocess.Popen(command, env=env, **pipes)  # type: ignore[call-overload]

    def _await(self, host: Host) -> None:
        said: list[str] = []
        for _ in range(_TRIES):  # on a busy machine Ray itself gives up too soon
            for line in self._nodes[host.number].stdout:  # type: ignore[union-attr]
                said.append(line)
                if "--block" in line:  # the last line before it waits
                    return
            host.kill()
            self._nodes[host.number].communicate()
            self._begin(host)
        raise AssertionError(f"host {host.number}: {''.join(said)}")

    def _env(self, host: Host) -> dict[str, str]:
        return self.env | {"DISTNADAM_TEST_HOST": host.address}

    def run(self, host: Host, *command: str, **env: str) -> Program:
        """Start a program on a host, in the repository's root, in the environment of `run.sh`."""
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        known = (
            assignments(self._settings(host))
            | self._env(host)
            | {"RAY_ADDRESS": self.address}
            | env
        )
        program = Program(subprocess.Popen(host.command(*command), env=known, cwd=ROOT, **pipes))  # type: ignore[call-overload]
        self._programs.append(program)
        return program

    def python(self, host: Host, *args: object, **env: str) -> Program:
        """Start Python likewise."""
        return self.run(host, sys.executable, *map(str, args), **env)

    def logged(self, pattern: str = "", since: float = 0.0) -> list[LogLine]:
        """Return the log lines of all hosts that contain a text, in order of time."""
        found = []
        for path in self._logs.iterdir():
            host, _, pid = path.name.rpartition("-")
            for line in path.read_text().splitlines():
                moment, _, text = line.partition(" ")
                if (
                    re.search(pattern, text)
                    and re.fullmatch(r"\d+\.\d+", moment)
                    and float(moment) >= since
                ):
                    found.append(LogLine(time=float(moment), host=host, pid=int(pid), text=text))
        return sorted(found, key=lambda line: line.time)

    def close(self) -> None:
        """End everything."""
        self.network.close()
        for node in self._nodes.values():
            node.communicate()
        for program in self._programs:
            program.close()
