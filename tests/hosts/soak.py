"""One long training across hosts amid faults, saves, reshards, drains and rates that change.

`python -m tests.hosts.soak --hours H --seed S` prints a line a minute and exits with 1 if a
process's memory or descriptors are not flat (`tests.hosts.usage`), one outlives the run, a
checkpoint's bits are not those of an undisturbed run, a push is lost or counted twice, or a command
fails.

Spells take turns: in one, anything happens; in the next, only what every process lives through, so
that there are processes old enough to be seen growing.
"""

import argparse
import json
import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distnadam import DistNadam
from distnadam.checkpoint import store
from tests.hosts.chaos import OPTIONS, WORKERS, miscounted, next_step, on_hosts, strike
from tests.hosts.cluster import Cluster
from tests.hosts.faults import FAULTS, Fault, Rng
from tests.hosts.network import Host
from tests.hosts.program import Program
from tests.hosts.tasks import Synthetic, digest, digest_of
from tests.hosts.train import train_in_one_process
from tests.hosts.usage import Watch, await_none, flat_or_not

NAME = "soak"
SIZE, SAVE_EVERY, RETUNE_EVERY, PAUSE_S = 20_000, 100, 130, 0.05
SHARDS = range(1, 5)
_WARM_UP_S, _SPELL_S = 120.0, 300.0
"""Of an hour or more; a shorter soak has both in proportion, see `_Soak`."""
_MINUTE_S = 60.0
_END_S = 60.0
_SAVE, _RESHARD, _DRAIN = "save", "reshard", "drain"
_FOREVER = 10**7


@dataclass
class Report:
    """What was done and found."""

    done: Counter[str] = field(default_factory=Counter)
    worst_s: float = 0.0
    worst: str = "nothing"
    steps: int = 0
    checkpoints: int = 0
    judged: int = 0
    differences: list[str] = field(default_factory=list)

    def counts(self) -> str:
        """Return how much of each was done."""
        others = {_SAVE: "saves", _RESHARD: "reshards", _DRAIN: "drains"}
        faults = sum(number for what, number in self.done.items() if what not in others)
        words = [f"{self.steps} steps", f"{faults} faults"]
        words += [f"{self.done[what]} {several}" for what, several in others.items()]
        return ", ".join([*words, f"worst to the next step {self.worst_s:.1f} s ({self.worst})"])

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {what}" for what, number in sorted(self.done.items()))
        ended = "FAILED" if self.differences else "passed"
        return "\n".join(
            [
                f"soak {ended}: {self.counts()}",
                f"done: {kinds}",
                f"{self.checkpoints} checkpoints compared, {self.judged} processes judged",
                *self.differences,
            ]
        )


class _Soak:
    def __init__(self, hours: float, seed: int, cluster: Cluster, directory: Path) -> None:
        self.report = Report()
        self._cluster, self._directory = cluster, directory
        self._rng: Rng = np.random.default_rng(seed)
        self._left: dict[bool, list[Fault | str]] = {True: [], False: []}
        self._seconds = hours * 3600
        self._warm_up_s = min(_WARM_UP_S, self._seconds / 6)
        self._spell_s = max(min(_SPELL_S, self._seconds / 2), 2.5 * self._warm_up_s)
        self._ends = directory / "ends"
        self._saved: list[Path] = []
        self._about: dict[str, Any] = {
            "size": SIZE,
            "steps": _FOREVER,
            "pause_s": PAUSE_S,
            "num_workers": WORKERS,
            "num_shards": 2,
            "replicas": 1,
            "save_every": SAVE_EVERY,
            "evaluate_every": RETUNE_EVERY,
            "keep": _FOREVER,
            "name": NAME,
            "directory": str(directory / "hosts"),
            "ends": str(self._ends),
        }
        self._about["options"] = OPTIONS | {"checkpoint_dir": str(directory / "hosts")}

    def play(self) -> None:
        """Train and disturb until the time is over, and compare."""
        head = self._cluster.hosts[0]
        program = self._cluster.python(head, "-m", "tests.hosts.train", json.dumps(self._about))
        with Watch(lambda: self._cluster.hosts) as watch:
            try:
                program.first("step")
                self._disturb(program, watch)
                self._ends.touch()
                program.first("done")
                program.finish()
                if left := await_none(watch, _END_S):
                    self._differ(f"LEFT after the run: {', '.join(life.role for life in left)}")
            except AssertionError as error:
                self._differ(f"FAILED: {error}")
                self._ends.touch()  # what follows compares a run that has ended
                with suppress(AssertionError):
                    program.finish()
        lives, window_s = watch.lives, self._warm_up_s / 2
        judged = [each for each in lives if each.growth(self._warm_up_s, window_s) is not None]
        self.report.judged = len(judged)
        self.report.differences += flat_or_not(judged, self._warm_up_s, window_s, self.report.steps)
        most = max(life.most_served for life in lives)
        if most > max(SHARDS):
            self._differ(f"NOT FLAT: a relay served {most} shards, of {max(SHARDS)}")
        self._compare()

    def _disturb(self, program: Program, watch: Watch) -> None:
        began, printed = time.monotonic(), 0
        while (since := time.monotonic() - began) < self._seconds:
            if since >= (printed + 1) * _MINUTE_S:
                printed = int(since / _MINUTE_S)
                self._count_steps(program)
                print(f"min {printed}: {self.report.counts()}; {watch.by_role()}", flush=True)
            gentle = int(since / self._spell_s) % 2 == 0
            what = self._draw(gentle)
            seconds = self._do(what, program)
            name = what if isinstance(what, str) else what.name
            self.report.done[name] += 1
            if seconds > self.report.worst_s:
                self.report.worst_s, self.report.worst = seconds, name
            time.sleep(self._rng.exponential(2.0))
        self._count_steps(program)

    def _draw(self, gentle: bool) -> Fault | str:
        """Return what happens next: each kind once, in a random order, then again."""
        left = self._left[gentle]
        if not left:
            kinds: list[Fault | str] = [fault for fault in FAULTS if fault.spares or not gentle]
            # a reshard and a drain make new processes
            kinds += 3 * [_SAVE] if gentle else [*3 * [_SAVE], *4 * [_RESHARD], *3 * [_DRAIN]]
            left += [kinds[index] for index in self._rng.permutation(len(kinds))]
        return left.pop()

    def _do(self, what: Fault | str, program: Program) -> float:
        """Do it; return the seconds until the next step."""
        if isinstance(what, Fault):
            return strike(what, program, self._cluster, self._rng, SIZE)[0]
        moment = time.time()
        if what == _SAVE:
            path = self._directory / "saved" / str(len(self._saved))
            self._command("save", NAME, path)
            self._saved.append(path)
        elif what == _RESHARD:
            self._command("reshard", NAME, int(self._rng.choice(SHARDS)))
        else:
            host = self._cluster.hosts[int(self._rng.integers(1, len(self._cluster.hosts)))]
            self._drain(host)
            seconds = next_step(program, moment)
            self._command("uncordon", host.address)
            return seconds
        return next_step(program, moment)

    def _drain(self, host: Host) -> None:
        """Drain a host; if it was killed just before, once it is a node again."""
        deadline = time.monotonic() + _MINUTE_S
        while True:
            try:
                self._command("drain", host.address, "--timeout", 120)
                return
            except AssertionError as error:
                if "is no node" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def _command(self, *command: object) -> None:
        self._cluster.python(self._cluster.hosts[0], "-m", "distnadam", *command).finish()

    def _count_steps(self, program: Program) -> None:
        self.report.steps = max(event["step"] for event in program.events if "step" in event)

    def _compare(self) -> None:
        """Compare each checkpoint with that of a run in one process, at the same step."""
        root = self._directory / "hosts"
        bits = [digest(path) for path in [*_checkpoints(root), *self._saved]]
        last = max(int(each["iterations"]) for each in bits)
        about = self._about | {"name": None, "replicas": 0, "pause_s": 0.0, "steps": last}
        del about["ends"]
        alone = self._directory / "alone"
        train_in_one_process(alone, about)
        expected = {each["iterations"]: each for each in map(digest, _checkpoints(alone))}
        with DistNadam(backend="local").build(Synthetic(SIZE).init(0)) as built:
            expected["0"] = digest_of(built)  # the first checkpoint is from before the first step
        for each in bits:
            step = int(each["iterations"])
            if str(step) not in expected:  # saved by the command, between two others
                expected[str(step)] = self._go_on(alone, about | {"steps": step})
            if each != expected[str(step)]:
                self._differ(f"DIFFERENT bits at step {step}")
        self.report.checkpoints = len(bits)
        if (lost := miscounted(root, last)) is not None:
            self._differ(f"DIFFERENT: {lost}")

    def _go_on(self, alone: Path, about: dict[str, Any]) -> dict[str, str]:
        """Return the bits at a step to which the run alone goes on from its checkpoint before."""
        directory = self._directory / f"alone{about['steps']}"
        before = [path for path in _checkpoints(alone) if _step_of(path) < about["steps"]]
        if before:
            shutil.copytree(before[-1], directory / before[-1].name)
        return train_in_one_process(directory, about)

    def _differ(self, text: str) -> None:
        self.report.differences.append(text)


def _checkpoints(root: Path) -> list[Path]:
    """Return the directories of a run's checkpoints, the oldest first."""
    return [root / each.name for each in store.step_directories(str(root))]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def play(hours: float, seed: int, cluster: Cluster, directory: Path) -> Report:
    """Soak a cluster for so long."""
    soak = _Soak(hours, seed, cluster, directory)
    soak.play()
    return soak.report


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    return on_hosts(partial(play, asked.hours, asked.seed))


if __name__ == "__main__":
    raise SystemExit(main())
