"""Law 5: kill any process at any moment, lose and delay any message: the same bits as one process
that counts the same pushes.

The machine drives real shards, standbys, workers and the supervisor in one thread
(`tests.simulation`); a worker's gradient depends on its round, rank, incarnation and parameters, so
that one that is lost, doubled, mixed or computed from wrong parameters changes bits.
"""

import contextlib
import shutil
import tempfile
from collections import Counter, deque
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phase_
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.client.checkpointing import CheckpointWriter, Saved
from distnadam.client.shard_group import ShardGroup
from distnadam.client.ticket import Ticket
from distnadam.config import Options, Settings, Topology
from distnadam.errors import (
    ClusterError,
    IllegalMessage,
    LatePush,
    PushesPending,
    RanksDisagree,
    StaleEpoch,
    StepTimeout,
    SupersededWorker,
    WorkerLost,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import packed_overrides, unpacked_overrides
from distnadam.protocol.round_settings import RoundSettings
from distnadam.shard.ledger import DIRECT
from distnadam.shard.phases import Phase
from distnadam.supervision.events import LookNow
from distnadam.tensors.arrays import cut_flat
from distnadam.worker import Worker
from tests.configurations import A_FEW
from tests.reference import OneProcess, State, history_of, state_of
from tests.simulation.backend import WorldBackend, begin_world
from tests.simulation.world import DOOMS, Process

RANKS = 3
SIZE = 3000
CUT = 1100
"""Where the first of the model's two tensors ends."""
INITIAL = np.linspace(-1, 1, SIZE, dtype=np.float32)
RANK, SHARD = st.integers(0, RANKS - 1), st.integers(0, 2)
OUTSIDE = np.random.default_rng(99).standard_normal(SIZE).astype(np.float32)
FAULTS = ("lose", "half", "lose answer", "repeat", "delay", "delay answer")
BEFALLS = (
    "ended",
    "ended under several ranks",
    "half sent",
    "stalled",
    "arrived, then asked again",
    "asked again, then arrived late",
    "overtaken answer",
    "late",
    "late, of another epoch",
    "late, of another incarnation",
    "a standby's connection ended, the round lost",
    "a standby's connection ended, the round arrived",
    "pushed as one",
    "a shard left its host",
    "as many shards were cut anew",
)
"""What must befall processes, and connections between hosts, in these examples."""
SEEN: Counter[str] = Counter()
ROUNDS_ENDED = (
    "voted",
    "ranks disagreed",
    "the mean of micro-batches was applied",
    "rates of one step were applied",
    "a tensor that some ranks lacked was stepped",
    "a tensor that all ranks lacked was not",
    "no rank had a gradient",
    "the loss scale has changed",
)
"""How rounds must have ended too."""
MUST_BEFALL = BEFALLS + ROUNDS_ENDED
EXPECTED = (StepTimeout, StaleEpoch, LatePush, SupersededWorker, WorkerLost, RanksDisagree)


def gradient(number: int, rank: int, incarnation: int, params: Any, attempt: int = 0) -> Any:
    if rank == DIRECT:
        return OUTSIDE  # its caller does not know in which round it will be
    if (7 * number + 3 * rank + incarnation) % 13 == 0:
        return None
    noise = (
        np.random.default_rng([number, rank, incarnation, attempt])
        .standard_normal(SIZE)
        .astype(np.float32)
    )
    return noise + np.float32(0.1) * params.astype(np.float32)


def settings_of(
    number: int, rank: int, incarnation: int, *, may_lack: bool = False
) -> RoundSettings:
    """What a worker says of a round: now and then a vote, or another count than the others', or
    that it lacks gradients, if it may.
    """
    drawn = (5 * number + 11 * rank + 3 * incarnation) % 23
    if rank == DIRECT or drawn == 0:
        return RoundSettings(found_inf=rank != DIRECT)
    return RoundSettings(
        micro_steps=1 + (number + (drawn == 1)) % 2,
        overrides=packed_overrides(**rates_of(number, differs=drawn == 2), patterns=None),
        absent=absent_of(number, drawn) if may_lack else frozenset(),
    )


def absent_of(number: int, drawn: int) -> frozenset[int]:
    """The tensors that a worker has no gradient of: for some rounds all workers lack some."""
    if number % 7 == 5:
        return frozenset({0, 1})
    both = {number % 2} if number % 3 == 1 else set()
    return frozenset(both | ({drawn % 2} if drawn % 3 == 0 else set()))


def tree_of(flat: Any, absent: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The model's tree of flat values, None where they are absent."""
    values = {"a": flat[:CUT], "w": flat[CUT:]}
    return {name: None if i in absent else x for i, (name, x) in enumerate(values.items())}


def rates_of(number: int, *, differs: bool) -> dict[str, Any]:
    """What a worker says of a round's learning rate and betas: for some rounds, now and then
    something else than the others.
    """
    changes = number % 3 == 0 or differs
    return {
        "lr": 0.01 * (1 + number % 4) if changes else None,
        "betas": (0.6, 0.99) if number % 2 and changes else None,
    }


class FaultsAgainstOneProcess(RuleBasedStateMachine):
    @initialize(
        num_shards=st.integers(1, 3),
        replicas=st.integers(0, 1),
        gone=st.sampled_from(
            [
                {"rejoin_timeout_s": 1e6},
                {"rejoin_timeout_s": 0.0},
                {"rejoin_timeout_s": 0.0, "min_workers": 1},
            ]
        ),
        clip=st.sampled_from([{}, {"clipnorm": 1.0}]),
        formula=st.sampled_from(A_FEW),
        pull_dtype=st.sampled_from([None, "bfloat16"]),
        objects=st.booleans(),
        hosts=st.sampled_from([1, 2, 2, 3]),
        per_host=st.sampled_from([1, 2, 2, 3]),
        sum_group=st.sampled_from([1, 2, 2, 3]),
    )
    def start(
        self,
        num_shards: int,
        replicas: int,
        gone: dict[str, Any],
        clip: dict[str, float],
        formula: dict[str, Any],
        pull_dtype: Literal["bfloat16"] | None,
        objects: bool,
        hosts: int,
        per_host: int,
        sum_group: int,
    ) -> None:
        self.drawn = {name: value for name, value in locals().items() if name != "self"}
        self.root = Path(tempfile.mkdtemp())
        self.begin()
        config = NadamConfig(
            clipvalue=0.5, pull_dtype=pull_dtype, sum_group=sum_group, **clip, **formula
        )
        self.options = Options(
            step_timeout_s=0.0, shard_timeout_s=1e-9, on_nonfinite="skip", kernel="numpy", **gone
        )
        self.config = config
        self.world, self.layout = begin_world(
            INITIAL,
            config,
            self.options,
            num_shards,
            RANKS,
            replicas,
            objects=objects,
            hosts=hosts,
            per_host=per_host,
            cut=CUT,
        )
        self.world.seen = SEEN
        self.attempts: Counter[tuple[int, int, int]] = (
            Counter()
        )  # pushes of a (round, rank, incarnation) that were dropped for certain
        self.settings = partial(settings_of, may_lack=config.clocks == "tensor")
        self.model = OneProcess(self.layout, config, INITIAL, self.given, self.settings)
        self.workers: dict[int, Worker] = {}
        self.tickets: dict[int, Ticket] = {}
        self.pushed: dict[int, tuple[int, int, int]] = {}
        self.epochs: dict[Process, int] = {}
        for rank in range(RANKS):
            self.join(rank)

    def begin(self) -> None:
        """Forget what is of another example."""

    def teardown(self) -> None:
        """Whatever happened, once it stops the run goes on: nobody waits for ever."""
        if not hasattr(self, "world"):
            return
        try:
            self.world.faults.clear()
            while self.world.late:
                self.world.deliver_one(0)
            target = (
                max(
                    (
                        process.host.shard.progress.round
                        for process in self.world.shards
                        if process.host
                    ),
                    default=0,
                )
                + 2
            )
            for _ in range(60):
                self.advance()
                self.agree()
                if all(
                    process.alive and process.host and process.host.shard.progress.round >= target
                    for process in self.world.shards
                ):
                    return
            raise AssertionError(
                f"nobody comes to round {target}: "
                f"{[p.host and p.host.shard.describe() for p in self.world.shards]}"
            )
        finally:
            shutil.rmtree(self.root)

    def given(self, number: int, rank: int, incarnation: int, params: Any) -> Any:
        """Return what a worker pushes: another gradient after each push that did not count; zeros
        where it has none.
        """
        absent = self.settings(number, rank, incarnation).absent
        if len(absent) == 2:
            return np.zeros(SIZE, np.float32)
        tried = self.attempts[number, rank, incarnation]
        found = gradient(number, rank, incarnation, params, tried)
        if found is not None:
            for index in absent:
                found[self.layout.tensors[index].begin : self.layout.tensors[index].end] = 0
        return found

    # What workers do

    @rule(rank=RANK)
    def join(self, rank: int) -> None:
        """Take the rank over, from a living worker too."""
        self.world.rested()
        self.tickets.pop(rank, None)
        self.workers.pop(rank, None)
        try:
            self.workers[rank] = Worker(self.controller(), rank)
        except StepTimeout:
            self.world.look()  # it is no member yet, or a shard lags behind

    @rule(rank=RANK)
    def push(self, rank: int) -> None:
        self.world.rested()
        if (worker := self.workers.get(rank)) is None or rank in self.tickets:
            return
        try:
            seen = worker.pull()
            params = np.concatenate([seen["a"], seen["w"]])
            given = self.given(worker.round + 1, rank, worker.session.incarnation, params)
            if given is None:
                given = np.full(SIZE, np.nan, np.float32)
            given = given * np.float32(worker.loss_scale)  # a power of two, which changes no bit
            self.pushed[rank] = (worker.round + 1, rank, worker.session.incarnation)
            says = self.settings(*self.pushed[rank])
            tree = tree_of(given, says.absent)
            lr, *betas = next(iter(unpacked_overrides(says.overrides)), (np.nan,) * 3)
            rates: dict[str, Any] = {
                "lr": None if np.isnan(lr) else lr,
                "betas": None if np.isnan(betas).any() else betas,
            }
            if says.micro_steps == 1:
                self.tickets[rank] = worker.push(tree, found_inf=says.found_inf, **rates)
                return
            worker.discard()
            for _ in range(says.micro_steps):  # whose mean is exact
                worker.accumulate(tree)
            self.tickets[rank] = worker.push(**rates)
        except SupersededWorker:
            del self.workers[rank]
        except EXPECTED:
            pass

    @rule(rank=RANK)
    def finish(self, rank: int) -> None:
        self.world.rested()
        if (ticket := self.tickets.get(rank)) is None:
            return
        try:
            ticket.result()
            self.see_end(rank, ticket)
        except StepTimeout:
            return
        except SupersededWorker:
            del self.workers[rank]
        except WorkerLost:
            self.attempts[self.pushed[rank]] += 1
        except RanksDisagree:
            SEEN["ranks disagreed"] += 1
        except EXPECTED:
            pass
        del self.tickets[rank]

    def see_end(self, rank: int, ticket: Ticket) -> None:
        """A worker that is told of its round's end knows whether it was a vote, as all others."""
        number, _, _ = self.pushed[rank]
        for process in self.world.shards:
            if not process.alive or process.host is None:
                continue
            progress = process.host.shard.progress
            if progress.round == self.workers[rank].session.round == number:
                counted = history_of(progress.members.ledger.to_dict(), number)[-1]
                says = [self.settings(number, *who) for who in counted]
                voted = any(each.found_inf for each in says)
                if self.config.loss_scale is not None:
                    voted |= any(gradient(number, *who, INITIAL) is None for who in counted)
                assert ticket.found_inf == voted
                assert ticket.found_inf == self.workers[rank].found_inf
                SEEN["voted"] += ticket.found_inf
                SEEN["no rank had a gradient"] += progress.outcome == "empty"
                if progress.outcome == "applied":
                    SEEN["the mean of micro-batches was applied"] += says[0].micro_steps > 1
                    SEEN["rates of one step were applied"] += bool(says[0].overrides)
                    lacking = [each.absent for each in says]
                    on_all = frozenset.intersection(*lacking)
                    SEEN["a tensor that all ranks lacked was not"] += bool(on_all)
                    SEEN["a tensor that some ranks lacked was stepped"] += (
                        frozenset.union(*lacking) > on_all
                    )
                    if progress.overrides or not self.world.supervisor.recoveries["rewound"]:
                        assert progress.overrides == says[0].overrides  # no file holds them

    @rule()
    def advance(self) -> None:
        """Everybody does a round as far as it goes."""
        for rank in range(RANKS):
            if rank not in self.workers:
                self.join(rank)
            self.push(rank)
        for rank in range(RANKS):
            self.finish(rank)
        self.world.look()

    @rule()
    def save(self) -> None:
        self.world.rested()
        topology = Topology(num_shards=len(self.world.shards), num_workers=RANKS)
        settings = Settings(config=self.config, options=self.options, topology=topology)
        saved = Saved(settings=settings, data={})
        with contextlib.suppress(StepTimeout, StaleEpoch):
            CheckpointWriter().save(self.controller(), LocalDirectory(self.root), saved)

    @rule(shares=st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    def reshard(self, shares: list[int]) -> None:
        self.world.rested()
        there = len(self.world.shards)
        with contextlib.suppress(*EXPECTED, ClusterError, IllegalMessage):
            self.controller().reshard(shares)
            SEEN["as many shards were cut anew"] += len(shares) == there

    @rule()
    def step_from_outside(self) -> None:
        self.world.rested()
        if self.config.loss_scale is not None:
            return  # its caller does not know by which it would have to be multiplied
        with contextlib.suppress(*EXPECTED, ClusterError, IllegalMessage, PushesPending):
            self.outsider.step(tree_of(OUTSIDE))

    @cached_property
    def outsider(self) -> ShardGroup:
        """One handle for all direct steps: an only shard is not held for most of them."""
        return self.controller()

    def controller(self) -> ShardGroup:
        return ShardGroup(
            WorldBackend(self.world),
            self.layout,
            self.options,
            poll_s=0.0,
        )

    # What befalls them

    @rule(index=SHARD)
    def kill_shard(self, index: int) -> None:
        self.world.shards[index % len(self.world.shards)].kill()

    @rule(index=SHARD, where=st.sampled_from(["before", "after"]))
    def doom_shard(self, index: int, where: str) -> None:
        """Let a shard die as it tells its standby of a round."""
        self.world.shards[index % len(self.world.shards)].crash = where

    @rule(index=SHARD)
    def kill_standby(self, index: int) -> None:
        if (standby := self.world.standbys.get(index)) is not None:
            standby.kill()

    @rule(
        index=SHARD,
        who=st.sampled_from(["shard", "standby", "both"]),
        stays=st.booleans(),
        doom=st.sampled_from(["", "", *DOOMS]),
    )
    def leave(self, index: int, who: str, stays: bool, doom: str) -> None:
        """Have hosts be left, of a shard, of all standbys or of both; sometimes they may be stayed
        on after all, and sometimes a shard dies while it gets another standby.
        """
        self.world.rested()
        left = [self.world.shards[index % len(self.world.shards)]] if who != "standby" else []
        left += self.world.standbys.values() if who != "shard" else []
        self.world.to_leave.update(left)
        self.world.doom = doom
        self.world.look()
        self.world.doom = ""
        if stays:
            self.world.to_leave.difference_update(left)

    @rule(rank=RANK)
    def kill_worker(self, rank: int) -> None:
        self.tickets.pop(rank, None)
        if (worker := self.workers.pop(rank, None)) is not None:
            self.world.kill_worker(rank, worker.session.incarnation)

    @rule(index=SHARD)
    def work(self, index: int) -> None:
        self.world.shards[index % len(self.world.shards)].work()

    @rule()
    def look(self) -> None:
        self.world.rested()
        self.world.look()

    @rule(faults=st.lists(st.sampled_from(["", "", *FAULTS]), min_size=1, max_size=6))
    def disturb(self, faults: list[str]) -> None:
        self.world.faults = deque(faults)

    @rule(seed=st.integers(0, 1 << 16), late=st.integers(0, 9))
    def advance_disturbed(self, seed: int, late: int) -> None:
        """Everybody does a round, and then another, while messages meet all sorts of faults, and
        perhaps the connection to a standby ends: nobody's death.
        """
        rng, draw = Random(seed), Random(-1 - seed)
        if followed := sorted(self.world.standbys):
            shard = self.world.shards[draw.choice(followed)]
            shard.connection_ends = draw.choice(["before", "after"])
        for _ in range(2):
            self.world.faults = deque(rng.choices(["", "", "", "repeat", *FAULTS], k=9))
            self.advance()
        if late >= 7:  # its worker may be another by then
            self.join(seed % RANKS)
        if late < 4 or late >= 7:  # else it comes after whatever befalls first
            self.world.deliver_one(late)

    @rule(absent=RANK, struck=RANK, kill=st.booleans(), fault=st.sampled_from(["", "repeat"]))
    def strike_at_a_waiting_push(self, absent: int, struck: int, kill: bool, fault: str) -> None:
        """Replace or kill a worker while its push, or its group's, waits for another's."""
        self.advance()
        self.world.faults = deque([fault])
        for rank in range(RANKS):
            if rank != absent:
                self.push(rank)
        if kill:
            self.kill_worker(struck)
            self.world.look()
        self.join(struck)
        self.world.deliver_one(0)
        self.push(struck)

    @rule(host=RANK)
    def end_connections(self, host: int) -> None:
        """Have a host's relay die: nobody's death."""
        self.world.end_connections(host=host)

    @rule(which=st.integers(0, 9))
    def deliver_late(self, which: int) -> None:
        self.world.deliver_one(which)

    # What must hold

    @invariant()
    def agree(self) -> None:
        """Every shard and standby holds the bits of one process that counted the same pushes, each
        needed rank's once in each round.
        """
        histories: dict[int, list[Any]] = {}
        for process in self.world.shards:
            if (
                process.alive
                and process.host is not None
                and process.host.shard.phase is not Phase.LOADING
            ):
                shard = process.host.shard
                assert self.epochs.get(process, 0) <= shard.epochs.now
                self.epochs[process] = shard.epochs.now
                history = history_of(shard.members.ledger.to_dict(), shard.progress.round)
                for number, counted in enumerate(history, 1):
                    assert tuple(rank for rank, _ in counted) in (
                        (DIRECT,),
                        shard.members.needed(number),
                    )
                if shard.phase is not Phase.STEPPING:
                    expected = self.expected(history, shard.epochs.rewound)
                    self.same_bits(state_of(process.host), expected, process)
                if shard.epochs.now:
                    histories.setdefault(shard.epochs.now, []).append(history)
        for process in self.world.standbys.values():
            if (
                process.alive
                and process.standby is not None
                and (now := process.standby.control_state) is not None
            ):
                arrays = {name: flat["float32"] for name, flat in process.standby.arrays.items()}
                state = State(
                    **arrays, clock=now.clock, skipped=now.skipped, loss_scale=now.loss_scale
                )
                rewound = max(number for number, reason in now.history if reason == "rewound")
                expected = self.expected(history_of(now.ledger, now.round), rewound)
                self.same_bits(state, expected, process)
        for same_epoch in histories.values():
            first = min(same_epoch, key=len)
            assert all(
                history[: len(first)] == first and len(history) <= len(first) + 1
                for history in same_epoch
            )

    def expected(self, history: Any, rewound: int) -> State:
        """Return the state that these rounds lead to, the last ones since that rewind."""
        return self.model.after(history)

    def same_bits(self, got: State, expected: State, process: Process) -> None:
        for name in self.config.state_arrays:
            cut = cut_flat({"float32": getattr(expected, name)}, process.spec.ranges)["float32"]
            assert getattr(got, name).tobytes() == cut.tobytes(), (
                f"{name} of shard {process.spec.index}"
            )
        assert (got.clock, got.skipped) == (expected.clock, expected.skipped)
        assert got.loss_scale == expected.loss_scale
        if self.config.loss_scale is not None and got.loss_scale != self.config.loss_scale.first:
            SEEN["the loss scale has changed"] += 1


@pytest.mark.parametrize("examples", [40, pytest.param(80, marks=pytest.mark.nightly)])
def test_faults_change_no_bit_and_count_every_push_once(examples: int) -> None:
    SEEN.clear()
    # Hypothesis takes constants from whatever modules are imported, so that examples differ from
    # process to process; where they lack what seldom befalls, longer ones follow
    for steps in (40, 44, 48, 52):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            FaultsAgainstOneProcess,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=True,
                database=None,
                phases=[Phase_.generate],  # shrinking would take longer than the suite may
                suppress_health_check=list(HealthCheck),
            ),
        )
        if all(SEEN[what] for what in MUST_BEFALL):
            return
    pytest.fail(f"nothing of {[what for what in MUST_BEFALL if not SEEN[what]]} befell them")


def started(num_shards: int, **others: Any) -> FaultsAgainstOneProcess:
    """Return a machine of one host and one standby for each shard, unless told otherwise."""
    machine = FaultsAgainstOneProcess()
    usual: dict[str, Any] = {
        "replicas": 1,
        "gone": {"rejoin_timeout_s": 1e6},
        "clip": {},
        "formula": {},
        "pull_dtype": None,
        "objects": False,
        "hosts": 1,
        "per_host": 1,
        "sum_group": 1,
    }
    machine.start(num_shards=num_shards, **(usual | others))
    return machine


@pytest.mark.parametrize("struck", [0, 1])
@pytest.mark.parametrize("kill", [False, True])
def test_a_member_that_is_replaced_while_its_group_waits_changes_no_bit(
    struck: int, kill: bool
) -> None:
    SEEN.clear()
    machine = started(num_shards=2, replicas=0, hosts=2, per_host=2, sum_group=2)
    machine.strike_at_a_waiting_push(absent=2, struck=struck, kill=kill, fault="")
    machine.agree()
    assert SEEN["pushed as one"] and SEEN["taken apart"]
    machine.teardown()


@pytest.mark.parametrize("leaves", ["standby", "both"])
@pytest.mark.parametrize("num_shards", [1, 2])  # the second one's standbys have copies
@pytest.mark.parametrize("doom", DOOMS)
def test_a_shard_whose_standby_moves_is_at_no_moment_without_one(
    doom: str, num_shards: int, leaves: str
) -> None:
    """A standby's host is to be left, and its shard dies at some moment of that: nobody goes back,
    and no bit changes.
    """
    SEEN.clear()
    machine = started(num_shards=num_shards)
    machine.advance()
    machine.advance()
    before = [machine.world.shards[-1], machine.world.standbys[num_shards - 1]]
    machine.world.to_leave.update(before if leaves == "both" else before[1:])
    machine.push(0)
    machine.world.doom = doom
    machine.world.look()
    assert SEEN[f"a shard died {doom}"] == 1
    recoveries = machine.world.supervisor.recoveries
    assert recoveries["promoted"] >= 1 and recoveries["rewound"] == 0
    for _ in range(3):
        machine.advance()
        machine.agree()
    now = [machine.world.shards[-1], machine.world.standbys[num_shards - 1]]
    assert all(each.alive for each in now) and before[0] not in now and before[1] not in now
    assert machine.world.supervisor.recoveries["rewound"] == 0
    assert not machine.world.supervisor.cluster.successors
    machine.teardown()


def test_a_successor_that_cannot_be_filled_leaves_the_present_standby_in_place() -> None:
    machine = started(num_shards=1)
    machine.advance()
    present, world = machine.world.standbys[0], machine.world
    host, fails = world.shards[0].host, [True, True]
    assert host is not None and host.connect_standby is not None
    connect = host.connect_standby

    def failing(*given: Any) -> Any:
        if fails and fails.pop():
            raise IllegalMessage("no room")
        return connect(*given)

    host.connect_standby = failing
    world.to_leave.add(present)
    while world.standbys[0] is present or world.supervisor.has_events:
        assert world.standbys[0].standby is not None
        assert world.standbys[0].standby.reached is not None, "one always follows"
        world.supervisor.notify(LookNow())
        world.supervisor.run_once()
        machine.advance()
    assert not fails and not present.alive
    assert sum(each.handle.alive for each in world.all_processes) == 2, "none is left over"
    machine.advance()
    machine.agree()
    machine.teardown()


def test_a_push_that_is_counted_for_a_former_worker_is_so_on_a_shard_that_takes_over() -> None:
    """A worker joins, and then a shard dies that knew of its predecessor's push, which another has
    counted and awaits norms for.
    """
    machine = started(num_shards=2, clip={"clipnorm": 1.0})
    for _ in range(5):
        machine.advance()
    for rank in (1, 0, 2):
        machine.world.faults = deque([] if rank == 1 else ["lose", ""])
        machine.push(rank)
    while machine.world.shards[1].work():
        pass
    host = machine.world.shards[1].host
    assert host is not None and host.shard.phase is Phase.AWAITING_NORMS
    machine.join(2)
    machine.world.shards[1].kill()
    machine.finish(0)
    machine.world.look()
    machine.push(2)
    for rank in (0, 1, 2, 0, 1, 2):
        machine.finish(rank)
    machine.agree()
    machine.advance()
    machine.agree()
    machine.teardown()
