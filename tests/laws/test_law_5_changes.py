"""Law 5 where hyper-parameters change between rounds while faults strike: each round steps with one
configuration on all shards and standbys, whatever dies, and a rewind has that of its checkpoint.
"""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phase_
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from distnadam.errors import ClusterError, IllegalMessage, ShardLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import SetConfig
from distnadam.runtime.shard_kernel import ShardKernel
from distnadam.shard.machine import Shard
from tests.laws.test_law_5_faults import EXPECTED, SEEN, SHARD, FaultsAgainstOneProcess
from tests.reference import State
from tests.simulation.world import Process

CHANGES: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"beta_1": 0.5, "beta_2": 0.9},
    {"clipnorm": None},
    {"clipnorm": 0.5},
    {"weight_decay": 0.2, "ema_momentum": 0.5},
    {"clipvalue": None, "epsilon": 1e-3},
]
STEPPED: dict[tuple[int, int], NadamConfig] = {}
"""By the epoch of the last rewind and the round, what shards stepped it with."""
MUST_BEFALL = (
    "a change",
    "a change while norms were awaited",
    "a change amid which a shard died before it was told",
    "a change amid which a shard died when it was told",
    "a change that a standby completed",
    "a change that standbys followed",
    "a promotion after a change",
    "a rewind after a change",
)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Have shards record what they step with; those of the model never rewound."""
    step = ShardKernel.step

    def recorded_step(self: ShardKernel, shard: Shard, keep: Any) -> Any:
        if shard.epochs.rewound:
            key = shard.epochs.rewound, shard.progress.round + 1
            assert STEPPED.setdefault(key, shard.config) == shard.config, "torn"
        return step(self, shard, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardKernel, "step", recorded_step)
        yield


class ChangesAmidFaults(FaultsAgainstOneProcess):
    """The machine of law 5, in which somebody changes the hyper-parameters and then saves.

    Until that is saved a death without a standby is an error, as it should be; so no fault strikes
    in between but the one that is drawn, where there are standbys, which follow the change.
    """

    def begin(self) -> None:
        STEPPED.clear()
        self.counts: dict[str, int] = {}
        self.has_changed = False

    @rule(
        values=st.sampled_from(CHANGES),
        struck=st.none() | SHARD,
        before=st.booleans(),
        gives_up=st.booleans(),
    )
    def change(
        self, values: dict[str, Any], struck: int | None, before: bool, gives_up: bool
    ) -> None:
        self.world.rested()
        self.world.faults.clear()
        for process in self.world.shards:
            process.crash = process.connection_ends = ""
        self.world.look()
        shards = self.world.shards
        followed = [self.world.standbys.get(index) for index in range(len(shards))]
        if struck is not None and all(each and each.alive for each in followed):
            self.strike(shards[struck % len(shards)], before=before)
        revision, is_done = max(self.revisions()), False
        with contextlib.suppress(*EXPECTED, ClusterError, IllegalMessage, ShardLost):
            awaited = any(p.host and p.host.shard.rounds.current.is_closed for p in shards)
            controller = self.controller()
            if gives_up:
                controller.retry.run = lambda work: work()  # type: ignore[method-assign]
            controller.set_config(values)
            SEEN["a change"] += 1
            SEEN["a change while norms were awaited"] += awaited
            is_done = True
        self.has_changed = True
        for process in shards:
            vars(process).pop("send", None)
        self.world.look()
        supervisor = self.world.supervisor
        assert supervisor.newest_map.failed is None
        SEEN["a change that a standby completed"] += (
            not is_done and min(self.revisions()) > revision
        )
        if is_done and struck is None:
            follow = [each for each in followed if each and each.alive and each.standby]
            known = [each.standby.control_state for each in follow if each.standby]
            assert all(each and each.revision == revision + 1 for each in known)
            SEEN["a change that standbys followed"] += bool(known)
        self.save()
        if supervisor.restore_points.known.would_lose is not None:
            shutil.rmtree(self.root)
            self.start(**self.drawn)  # shards cannot be paused now, and a death would be an error

    def revisions(self) -> list[int]:
        return [p.host.shard.progress.revision if p.host else 0 for p in self.world.shards]

    def strike(self, process: Process, *, before: bool) -> None:
        """Have a shard die before it is told of a change, or as soon as it is."""

        def send(message: Any) -> Future[Any]:
            if not isinstance(message, SetConfig):
                return Process.send(process, message)
            when = "before it" if before else "when it"
            SEEN[f"a change amid which a shard died {when} was told"] += 1
            if before:
                process.kill()
            answer = Process.send(process, message)
            process.kill()
            return answer

        process.send = send  # type: ignore[method-assign]

    def expected(self, history: Any, rewound: int) -> State:
        configs = self.model.configs
        which = []
        for number in range(1, len(history) + 1):
            eras = [era for era, other in STEPPED if other == number and era <= rewound]
            config = STEPPED[max(eras), number] if eras else configs[0]
            if config not in configs:
                configs.append(config)
            which.append(configs.index(config))
        recoveries = self.world.supervisor.recoveries
        for name, what in (("promoted", "a promotion"), ("rewound", "a rewind")):
            if recoveries[name] > self.counts.get(name, 0) and self.has_changed:
                SEEN[f"{what} after a change"] += 1
            self.counts[name] = recoveries[name]
        return self.model.after(history, tuple(which))


@pytest.mark.parametrize("examples", [15, pytest.param(80, marks=pytest.mark.nightly)])
def test_changes_amid_faults_hold_from_one_round_on_everywhere(examples: int) -> None:
    SEEN.clear()
    for steps in (40, 44, 48, 52):  # as in law 5's other test
        with recorded():
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                ChangesAmidFaults,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=steps,
                    derandomize=True,
                    database=None,
                    phases=[Phase_.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        if all(SEEN[what] for what in MUST_BEFALL):
            return
    pytest.fail(f"nothing of {[what for what in MUST_BEFALL if not SEEN[what]]} befell them")
