"""Hosts on one machine: network namespaces around a switch, with links that can be cut and shaped.

No namespace has a name, so two networks never meet, and the kernel removes each with its last
process. A keeper ends those processes when the network is closed or its maker dies. A host's
processes see their host's processes alone, and its own /tmp/ray, where Ray keeps its sockets; all
hosts share the other files, /dev/shm and the hostname.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

BURST_BYTES = 256 * 2**10
"""What passes at once over a cable of limited speed that was idle."""
_SUBNET = "10.77.0"
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_INIT = """
import os, time
print("ready", flush=True)
while True:
    try:
        os.wait()  # reap orphans, as a host's first process must
    except ChildProcessError:
        time.sleep(0.1)
"""


def why_not() -> str | None:
    """Return why hosts cannot be made here, or None; computed once."""
    return _why_not()


@functools.cache
def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [
        tool
        for tool in ("ip", "ss", "tc", "unshare", "nsenter", "mount")
        if shutil.which(tool) is None
    ]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    pair = "ip link add name switch type bridge && ip link add name port type veth peer name cable"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", pair], capture_output=True, text=True
    )
    return (
        f"this machine makes no network namespaces: {done.stderr.strip()}"
        if done.returncode
        else None
    )


def _inside(pid: int, *command: str, whole: bool = False) -> list[str]:
    return ["nsenter", "-t", str(pid), "-n", *(["-m", "-p"] if whole else []), "--", *command]


def _do(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Host:
    """One host, known by the process that holds its namespaces.

    `port` is the end of its link at the switch, which the process `switch` holds.
    """

    number: int
    holder: int
    switch: int

    @property
    def address(self) -> str:
        """The host's end of its link."""
        return f"{_SUBNET}.{self.number}"

    @property
    def port(self) -> str:
        """The switch's end of its link."""
        return f"port{self.number}"

    def command(self, *command: str) -> list[str]:
        """Return a command line that runs another on this host, as a child of its process."""
        return _inside(self.holder, *command, whole=True)

    # The cable

    def cut(self) -> None:
        """Take the link down: nothing passes, and no one is notified."""
        _do(_inside(self.switch, "ip", "link", "set", self.port, "down"))

    def mend(self) -> None:
        """Take the link up again."""
        _do(_inside(self.switch, "ip", "link", "set", self.port, "up"))

    def deafen(self) -> None:
        """Drop everything that is sent to this host."""
        _do(_inside(self.switch, "tc", "qdisc", "replace", "dev", self.port, "root", "blackhole"))

    def silence(self) -> None:
        """Drop everything that this host sends."""
        _do(_inside(self.holder, "tc", "qdisc", "replace", "dev", "eth0", "root", "blackhole"))

    def shape(self, bits_per_s: float, *, burst_bytes: int = BURST_BYTES) -> None:
        """Limit the bits per second in each direction, after an initial burst."""
        tbf = [
            "root",
            "tbf",
            "rate",
            f"{bits_per_s:.0f}bit",
            "burst",
            str(burst_bytes),
            "latency",
            "50ms",
        ]
        _do(_inside(self.holder, "tc", "qdisc", "replace", "dev", "eth0", *tbf))
        _do(_inside(self.switch, "tc", "qdisc", "replace", "dev", self.port, *tbf))

    def lose_and_reorder(self, lost: float, late: float) -> None:
        """Drop a share of the packets of each direction, and let a share be overtaken.

        A classic BPF program draws a class for each packet at random: one is a black hole, one a
        slow lane.
        """
        first = round(2**32 * (1 - lost - late))
        second = round(2**32 * (1 - lost))
        draw = "32 0 0 4294963256"  # a random number
        program = (
            f"7,{draw},53 1 0 {first},6 0 0 65537,53 1 0 {second},6 0 0 65538,6 0 0 65539,6 0 0 0"
        )
        for pid, device in ((self.holder, "eth0"), (self.switch, self.port)):
            tc = f"tc qdisc replace dev {device} root handle 1: htb default 1 r2q 1000000"
            for number, rate in ((1, "10gbit"), (2, "4mbit burst 200 cburst 200"), (3, "10gbit")):
                tc += f" && tc class add dev {device} parent 1: classid 1:{number} htb rate {rate}"
            tc += f" && tc qdisc add dev {device} parent 1:2 pfifo limit 20"
            tc += f" && tc qdisc add dev {device} parent 1:3 blackhole"
            tc += f" && tc filter add dev {device} parent 1: protocol all bpf bytecode '{program}'"
            _do(_inside(pid, "sh", "-c", tc))

    def unshape(self) -> None:
        """Remove all limits and losses."""
        for pid, device in ((self.holder, "eth0"), (self.switch, self.port)):
            subprocess.run(
                _inside(pid, "tc", "qdisc", "del", "dev", device, "root"), capture_output=True
            )

    def close_port(self, port: int) -> None:
        """Drop what others send to a TCP port of this host, as a firewall does; once."""
        wanted = ("to", self.address, "ipproto", "tcp", "dport", str(port))
        for rule in (
            ("add", "pref", "2", "lookup", "local"),
            ("add", "pref", "1", *wanted, "blackhole"),
            ("del", "pref", "0"),  # what comes first may drop nothing
        ):
            _do(_inside(self.holder, "ip", "rule", *rule))

    def open_port(self) -> None:
        """Take that back."""
        for rule in (
            ("add", "pref", "0", "lookup", "local"),
            ("del", "pref", "1"),
            ("del", "pref", "2"),
        ):
            _do(_inside(self.holder, "ip", "rule", *rule))

    def traffic(self) -> tuple[int, int]:
        """Return the bytes received and sent over the link so far."""
        for line in Path(f"/proc/{self.holder}/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "eth0":
                fields = numbers.split()
                return int(fields[0]), int(fields[8])
        raise OSError(f"host {self.number} has no cable")

    # Its connections

    def listening(self, first: int, last: int) -> list[int]:
        """Return the TCP ports of a range at which its processes listen."""
        lines = self._ss("-ltnH", f"( sport >= :{first} and sport <= :{last} )")
        return sorted({int(line.split()[3].rpartition(":")[2]) for line in lines})

    def reset(self, first: int, last: int) -> None:
        """Reset its connections from and to a range of ports."""
        for end in ("sport", "dport"):
            self._ss("-K", "-tnH", f"( {end} >= :{first} and {end} <= :{last} )")

    def _ss(self, *args: str) -> list[str]:
        done = subprocess.run(
            _inside(self.holder, "ss", *args), capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    # Its processes

    def processes(self) -> set[int]:
        """Return the ids, outside the host, of its processes, without those that hold it."""
        return in_namespaces({namespace(self.holder)}) - {self.holder, parent(self.holder)}

    def kill(self) -> None:
        """Kill every process of this host, as a power cut would."""
        kill_all(self.processes)


class Network:
    """A switch and the hosts around it; a context manager that leaves nothing behind.

    Args:
        directory: for the hosts' own files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        keeper = ["unshare", "--net", sys.executable, "-m", "tests.hosts.keeper"]
        self._keeper = subprocess.Popen(
            keeper, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._keeper.stdout is not None
        self._keeper.stdout.readline()
        self.switch = self._keeper.pid
        self.hosts: list[Host] = []
        self._makers: list[subprocess.Popen[str]] = []
        try:
            _do(
                _inside(
                    self.switch,
                    "sh",
                    "-c",
                    "ip link add switch type bridge && ip link set switch up",
                )
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add_host(self) -> Host:
        """Add a host."""
        maker = subprocess.Popen(
            [*_UNSHARE, sys.executable, "-c", _INIT],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._makers.append(maker)
        assert maker.stdout is not None and self._keeper.stdin is not None
        maker.stdout.readline()
        print(namespace(maker.pid), file=self._keeper.stdin, flush=True)
        (holder,) = Path(f"/proc/{maker.pid}/task/{maker.pid}/children").read_text().split()
        host = Host(len(self._makers), int(holder), self.switch)
        own = self._directory / f"host{host.number}" / "ray"
        own.mkdir(parents=True)
        os.chmod(own, 0o777)
        port = (
            f"ip link add {host.port} type veth peer name eth0 netns {holder} && ip link "
            f"set {host.port} master switch up"
        )
        _do(_inside(self.switch, "sh", "-c", port))
        cable = (
            f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up && ip link set "
            "lo up && ip route add default dev eth0"
        )
        _do(
            host.command("sh", "-c", f"{cable} && mkdir -p /tmp/ray && mount --bind {own} /tmp/ray")
        )
        self.hosts.append(host)
        return host

    def close(self) -> None:
        """End every process on it; the namespaces end with them."""
        self._keeper.communicate()
        for maker in self._makers:
            maker.communicate()


def namespace(pid: int) -> str:
    """Return the network namespace of a process, or "" if the process does not exist."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""


def parent(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def in_namespaces(namespaces: set[str]) -> set[int]:
    """Return all processes of these network namespaces, never one of this process's own."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return {pid for pid in pids if namespace(pid) in namespaces - {"", namespace(os.getpid())}}


def kill_all(find: Callable[[], set[int]], *, but: str = "") -> None:
    """Kill what `find` returns until it is empty, but not the process that runs `but`."""
    while pids := find():
        for pid in pids:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() != but:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
