"""What each process of a run takes of its host over time: memory of its own and descriptors.

A process is flat if, of each, the median of the last window of its life is above that of the
window after its warm-up by no more than a bound, the driver's beside what its `History` has.
Medians, since a save or a move of the state takes more for a moment; after a warm-up, since a
process takes what it needs at first bit by bit. What a relay needs for the shards that it serves
and for their workers is not counted as growth, since it changes with their number: instead it may
serve no more of them than there are. A standby that takes over begins a new life, since it has
workers to serve from then on.

Memory is what a process has written and no other process has. Pages of files that it maps and has
not written are nobody's own: they become private by the end of the other processes that map them.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Self

from distnadam.backends.ray.output import PREFIX, RELAY, ROLES, SHARD
from tests.descriptors import CONNECTED, LISTENS, descriptors_of
from tests.hosts.network import Host

GROWTH_BYTES, GROWTH_DESCRIPTORS = 16 * 2**20, 12
"""By how much a process may grow and be flat: a supervisor has up to 9 more for six more shards."""
DRIVER = "Driver"
_OF_STEP = 256
"""Bytes that a `History` has of each step: 4 numbers with their places in lists, and 5 in an array.
"""
_OF_SHARD, _OF_WORKER = 5, 3
"""What a relay needs for each shard and for each connection of a worker: the sockets themselves,
what waits for them, TCP's and Ray's to the shard; the worker's memory, which has two.
"""
_EVERY_S = 2.0


@dataclass
class Life:
    """The samples of one process: seconds, bytes of its own, and descriptors.

    `kinds` are its descriptors by kind, at the last of them.
    """

    role: str
    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    most_served: int = 0

    def growth(self, warm_up_s: float, window_s: float) -> tuple[float, float] | None:
        """Return by how many bytes and descriptors it grew; None if it lived too briefly."""
        begin, end = self.samples[0][0] + warm_up_s, self.samples[-1][0]
        if end < begin + 2 * window_s:
            return None
        early = [each for each in self.samples if begin <= each[0] < begin + window_s]
        late = [each for each in self.samples if each[0] > end - window_s]
        if not early or not late:
            return None
        grown = [median(e[i] for e in late) - median(e[i] for e in early) for i in (1, 2)]
        return grown[0], grown[1]


def role_of(command: str) -> str | None:
    """Return what a process is, from its command line; None if it is not of the run itself."""
    words = command.split()
    if words and words[0] == f"ray::{PREFIX}":
        return next((word for word in words if word in ROLES), None)
    # not what enters the host's namespaces and has it as a child
    return DRIVER if words[1:3] == ["-m", "tests.hosts.train"] else None


def flat_or_not(
    lives: Iterable[Life], warm_up_s: float, window_s: float, steps: int = 0
) -> list[str]:
    """Return a sentence for each process that is not flat, in a run of so many steps."""
    found = []
    for life in lives:
        grown = life.growth(warm_up_s, window_s)
        most = GROWTH_BYTES + (_OF_STEP * steps if life.role == DRIVER else 0)
        if grown is not None and (grown[0] > most or grown[1] > GROWTH_DESCRIPTORS):
            found.append(
                f"NOT FLAT: {life.role.lower()}, process {life.pid}, grew by "
                f"{grown[0] / 2**20:.1f} MiB and {grown[1]:g} descriptors in "
                f"{life.samples[-1][0] - life.samples[0][0]:.0f} s; at last it has "
                + ", ".join(f"{number} {kind}" for kind, number in sorted(life.kinds.items()))
            )
    return found


class Watch:
    """Samples all processes of a run from a thread, until it is closed; a context manager.

    Args:
        hosts: returns the hosts.
    """

    def __init__(self, hosts: Callable[[], list[Host]]) -> None:
        self._hosts = hosts
        self._lives: dict[tuple[int, str, int], Life] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join()

    @property
    def lives(self) -> list[Life]:
        """Every process so far, dead or alive."""
        with self._lock:
            return [
                Life(each.role, each.pid, list(each.samples), each.kinds, each.most_served)
                for each in self._lives.values()
            ]

    def by_role(self) -> str:
        """Return how many of each role live, and the most that one of them takes."""
        now, words = monotonic(), []
        for role in (DRIVER, *ROLES):
            last = [
                life.samples[-1]
                for life in self.lives
                if life.role == role and life.samples[-1][0] > now - 2 * _EVERY_S
            ]
            if last:
                most = max(size for _, size, _ in last) / 2**20
                descriptors = max(number for _, _, number in last)
                words.append(f"{len(last)} {role.lower()} {most:.0f} MiB {descriptors} fd")
        return ", ".join(words)

    def left(self) -> list[Life]:
        """Look once, and return the processes that live."""
        before = monotonic()
        self._look()
        return [life for life in self.lives if life.samples[-1][0] >= before]

    def _run(self) -> None:
        while not self._closed.is_set():
            self._look()
            self._closed.wait(_EVERY_S)

    def _look(self) -> None:
        for pid in {pid for host in self._hosts() for pid in host.processes()}:
            with suppress(OSError, ValueError, IndexError):  # it has ended
                process = Path(f"/proc/{pid}")
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if (role := role_of(command)) is None:
                    continue
                began = (process / "stat").read_text().rpartition(")")[2].split()[19]
                kinds = descriptors_of(pid)
                number = kinds.total()
                stage = kinds[LISTENS] if role == SHARD else 0  # one more once it has taken over
                if role == RELAY:
                    number -= _OF_SHARD * kinds[LISTENS] + _OF_WORKER * kinds[CONNECTED]
                sample = (monotonic(), own_bytes(pid), number)
                with self._lock:
                    life = self._lives.setdefault((pid, began, stage), Life(role, pid))
                    life.samples.append(sample)
                    life.kinds = kinds
                    life.most_served = max(life.most_served, kinds[LISTENS])


def own_bytes(pid: int) -> int:
    """Return the bytes that a process has written and no other process has.

    Raises:
        OSError: it has ended.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(each.split()[1]) for each in lines if each.startswith("Private_Dirty:"))


def await_none(watch: Watch, patience_s: float) -> list[Life]:
    """Wait until no process of the run lives; return those that still do after the patience."""
    deadline = monotonic() + patience_s
    while (left := watch.left()) and monotonic() < deadline:
        sleep(0.5)
    return left
