"""Strike at training with a seeded schedule of faults and compare the end, bit for bit, with a run
that nothing disturbed.

`python -m tests.chaos.run --faults N --seed S`; exit status 1 on any difference, with what repeats
it.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray

from distnadam.protocol.supervisor_messages import MembershipHistory
from tests.chaos.blows import pause
from tests.chaos.command import RAYS_OWN, strike
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.scene import Case, Nodes, Scene, described, ledgers, members_of, stage, undisturbed
from tests.chaos.trainers import WORKERS, despite_rewinds
from tests.models import bits

FAULTS_PER_CASE = 6
_ROUNDS_AFTER = 30
_PER_FAULT_OF_RAYS_OWN = 25
"""Faults for each that strikes a process of Ray's own, which takes a run of its own."""


@dataclass
class Report:
    """What was done and seen: by kind and replicas, the seconds from each death to the next
    step.
    """

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    recoveries: Counter[str] = field(default_factory=Counter)
    rays_own: Counter[str] = field(default_factory=Counter)
    replayed: int = 0
    lost: int = 0
    doubled: int = 0
    rounds: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Faults struck so far."""
        return sum(map(len, self.seconds.values()))

    @property
    def kinds(self) -> set[str]:
        """Kinds of fault struck so far."""
        return {kind for kind, _ in self.seconds}

    def __str__(self) -> str:
        lines = [f"{'kind':34} replicas  faults  to the next step, s: median  worst"]
        for (kind, replicas), times in sorted(self.seconds.items()):
            lines.append(
                f"{kind:34} {replicas:8} {len(times):7} {median(times):28.2f} {max(times):6.2f}"
            )
        recovered = ", ".join(
            f"{number} {what}" for what, number in sorted(self.recoveries.items())
        )
        lines.append(
            f"{self.faults} faults of {len(self.kinds)} kinds in {self.rounds} rounds; recoveries: "
            f"{recovered}"
        )
        lines.append(
            f"rounds replayed {self.replayed}, gradients lost {self.lost}, doubled {self.doubled}"
        )
        lines += [f"{kind}: {number}" for kind, number in sorted(self.rays_own.items())]
        return "\n".join([*lines, *self.differences])


def cases(rng: np.random.Generator) -> list[Case]:
    """Configurations in a random order; every kind of fault fits some."""
    found = [
        Case(3, 1, clocks="tensor"),
        Case(2, 0, checkpoints=True, named=True),
        Case(2, 1, clipnorm=0.5, named=True, checkpoints=True),
        Case(1, 0),
        Case(3, 0, clipnorm=0.5, checkpoints=True, clocks="tensor"),
        Case(1, 1, checkpoints=True, scaled=True),
        Case(2, 0, scaled=True),
        Case(2, 1, transport="objects", clocks="tensor"),
        Case(2, 0, clipnorm=0.5, transport="objects", checkpoints=True),
        Case(2, 0, named=True, checkpoints=True, elastic=True),
        Case(3, 1, clipnorm=0.5, elastic=True, scaled=True),
    ]
    return [found[i] for i in rng.permutation(len(found))]


def cases_of_nodes() -> list[Case]:
    """Configurations on two Ray nodes, named, since the supervisor may live on the one that
    dies.
    """
    both = {"named": True, "checkpoints": True, "nodes": 2}
    return [Case(2, 1, **both), Case(3, 0, **both)]  # type: ignore[arg-type]


def kill(scene: Scene, faults: list[Fault], rng: np.random.Generator, report: Report) -> None:
    """Strike one fault after another, each at a random moment once training goes on."""
    for fault in faults:
        scene.await_step(time.monotonic())
        pause(rng)
        if scene.case.checkpoints and rng.random() < 0.5:
            despite_rewinds(lambda: scene.optimizer.save(scene.directory / "checkpoints"))
        before = scene.counts()
        moment = fault.kill(scene, rng)
        seconds = scene.await_step(moment) - moment
        report.seconds.setdefault((fault.name, scene.case.replicas), []).append(seconds)
        counts = scene.counts()
        for what, number in counts.items():
            report.recoveries[what] += number - min(before[what], number)
        print(f"  {fault.name}: {seconds:.2f} s, round {scene.board.round}, {counts}", flush=True)


def compare(scene: Scene, report: Report) -> None:
    """End the training and compare everything with an undisturbed run; count rounds by rank in
    every shard's ledger.
    """
    end = scene.board.round + _ROUNDS_AFTER
    scene.crowd.finish(end)
    rounds = scene.optimizer.round
    schedule = described(scene.optimizer)[0].schedule
    with undisturbed(scene.case, rounds, schedule) as expected:
        tensors = len(expected.shards.layout.tensors)
        names = ["clocks", *["params"] * tensors, *["average"] * tensors * scene.case.scaled]
        names += ["moments"]
        pairs = zip(despite_rewinds(lambda: bits(scene.optimizer)), bits(expected), strict=True)
        differ = {
            names[min(i, len(names) - 1)]
            for i, (ours, theirs) in enumerate(pairs)
            if ours != theirs
        }
    for what in sorted(differ):
        report.differences.append(f"DIFFERENT: {what} after {rounds} rounds with {scene.case}")
    for index, ledger in enumerate(all_ledgers := ledgers(scene.optimizer)):
        lost, doubled = count(ledger, rounds, schedule)
        report.lost, report.doubled = report.lost + lost, report.doubled + doubled
        if lost or doubled or ledger["runs"] != all_ledgers[0]["runs"]:
            report.differences.append(
                f"DIFFERENT: the ledger of shard {index} with {scene.case}: {ledger['runs']}, "
                f"{all_ledgers[0]['runs']}"
            )
    report.replayed += scene.board.replayed
    report.rounds += rounds


def count(
    ledger: Mapping[str, Any],
    rounds: int,
    schedule: MembershipHistory = ((1, tuple(range(WORKERS))),),
) -> tuple[int, int]:
    """Return how many (rank, round) of these members a ledger lacks, and how many it has more than
    once, or of others.
    """
    counted = Counter(
        (rank, number)
        for rank, _, first, last in ledger["runs"]
        for number in range(first, last + 1)
    )
    required = {
        (rank, number) for number in range(1, rounds + 1) for rank in members_of(schedule, number)
    }
    return len(required - set(counted)), sum(number - 1 for number in counted.values()) + len(
        set(counted) - required
    )


def play(
    num_faults: int,
    seed: int,
    *,
    per_case: int = FAULTS_PER_CASE,
    only: str | None = None,
    within: str = "",
    nodes: Nodes | None = None,
) -> Report:
    """Strike so many faults, each kind in turn, over all configurations, on the nodes given or on
    the Ray that runs.
    """
    rng, report = np.random.default_rng(seed), Report()
    left: list[Case] = []
    struck: Counter[str] = Counter()
    while report.faults < num_faults and not report.differences:
        left = left or [
            case
            for case in (cases(rng) if nodes is None else cases_of_nodes())
            if within in str(case)
        ]
        case = left.pop(0)
        fitting = [
            fault for fault in FAULTS if fault.fits(case) and (only is None or only == fault.name)
        ]
        fitting = [fitting[i] for i in rng.permutation(len(fitting))]
        fitting.sort(key=lambda fault: struck[fault.name])  # the rarest so far first
        chosen = (
            (fitting * per_case)[: min(per_case, num_faults - report.faults)] if fitting else []
        )
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        if not chosen:
            continue
        struck.update(fault.name for fault in chosen)
        print(f"{case}: {', '.join(fault.name for fault in chosen)}", flush=True)
        with (
            tempfile.TemporaryDirectory() as directory,
            stage(case, Path(directory), f"chaos-{seed}-{report.faults}", nodes) as scene,
        ):
            try:
                kill(scene, chosen, rng, report)
                compare(scene, report)
            except Exception as error:
                report.differences.append(f"FAILED with {case}: {type(error).__name__}: {error}")
    return report


def play_rays_own(num_faults: int, seed: int, report: Report, *, only: str | None = None) -> None:
    """Kill so many processes of Ray's own, each under a run of the command that started it."""
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in RAYS_OWN if only in (None, kind)]
    for number in range(num_faults if kinds else 0):
        kind = kinds[number % len(kinds)]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                difference = strike(kind, rng, Path(directory))
            except Exception as error:
                difference = f"FAILED with {kind}: {type(error).__name__}: {error}"
        report.rays_own[kind] += 1
        print(f"  {kind}: the run took {time.monotonic() - began:.1f} s", flush=True)
        if difference:
            report.differences.append(difference)
            return


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of fault, by its name")
    parser.add_argument("--within", default="", help="configurations that hold this text")
    parser.add_argument(
        "--nodes", action="store_true", help="on two Ray nodes, of which one may be killed"
    )
    asked = parser.parse_args()
    os.environ.update(
        RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0"
    )
    nodes = Nodes(2) if asked.nodes else None
    if nodes is None:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=400 * 2**20,
            log_to_driver=False,
        )
    only_rays_own = asked.only in RAYS_OWN
    report = play(
        0 if only_rays_own else asked.faults,
        asked.seed,
        only=asked.only,
        within=asked.within,
        nodes=nodes,
    )
    if nodes is None and not report.differences:
        number = asked.faults if only_rays_own else asked.faults // _PER_FAULT_OF_RAYS_OWN
        play_rays_own(number, asked.seed, report, only=asked.only)
    if nodes is not None:
        nodes.close()
    print(report)
    if report.differences:
        only = " --nodes" * asked.nodes + "".join(
            f" --{option} '{value}'"
            for option, value in (("only", asked.only), ("within", asked.within))
            if value
        )
        print(
            f"to repeat: python -m tests.chaos.run --faults {asked.faults} --seed "
            f"{asked.seed}{only}"
        )
    return 1 if report.differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
