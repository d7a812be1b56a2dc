"""Law 6: every push is counted once or refused by name; delivered twice it counts once; late and
not counted it is LatePush.
"""

import contextlib
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distnadam import DistNadam, Options
from distnadam.errors import (
    LatePush,
    ProtocolError,
    PushesPending,
    RoundMismatch,
    StaleEpoch,
    StepTimeout,
    SupersededWorker,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import (
    Join,
    Pause,
    Push,
    Read,
    Resume,
    RoundResult,
    ShardSpec,
    Step,
    Write,
)
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import STATE_ARRAYS
from distnadam.tensors.layout import Layout
from tests.models import bits, gradients, params

RANKS = 3
SIZE = 5


def new_host() -> ShardHost:
    layout = Layout.of({"w": np.ones(SIZE, np.float32)})
    host = ShardHost(
        ShardSpec(
            index=0,
            num_shards=1,
            num_workers=RANKS,
            replicas=0,
            name=None,
            config=NadamConfig(),
            options=Options(),
            layout=layout,
            ranges=layout.cuts(1)[0],
        )
    )
    host.send(Pause("setup")).result(0)
    host.send(
        Write(token="setup", state={"params": {"float32": np.ones(SIZE, np.float32)}})
    ).result(0)
    host.send(Resume("setup")).result(0)
    return host


def state_of(host: ShardHost) -> dict[str, Any]:
    host.send(Pause("read")).result(0)
    arrays = host.send(Read("read", STATE_ARRAYS)).result(0)
    copy = {name: flat["float32"].tobytes() for name, flat in arrays.items()}
    host.send(Resume("read")).result(0)
    return copy


def values(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


class OnceAgainstAModel(RuleBasedStateMachine):
    """Pushes in any order, repeated, late, early, of old incarnations and epochs, against a plain
    record of what must count.
    """

    @initialize()
    def start(self) -> None:
        self.host = new_host()
        self.round, self.epoch = 0, 1
        self.newest = dict.fromkeys(range(RANKS), 0)
        self.pending: dict[int, Push] = {}
        self.counted: set[tuple[int, int, int]] = set()
        self.rounds: list[list[Push]] = []
        self.waiting: list[tuple[int, Future[Any]]] = []
        for rank in range(RANKS):
            self.join(rank)

    @rule(rank=st.integers(0, RANKS - 1))
    def join(self, rank: int) -> None:
        """The predecessor's push is set aside: it counts no more, and who waits for it hears so
        once the successor pushes.
        """
        self.newest[rank] += 1
        self.pending.pop(rank, None)
        assert self.host.send(Join(rank=rank)).result(0).incarnation == self.newest[rank]

    @rule(
        rank=st.integers(0, RANKS - 1),
        back=st.sampled_from([0, 0, 0, 0, 0, -1, 1, 2]),
        old=st.sampled_from([0, 0, 0, 0, 1, 2]),
        stale=st.sampled_from([False] * 7 + [True]),
        seed=st.integers(0, 9),
        settings=st.sampled_from(
            [ORDINARY] * 7 + [RoundSettings(found_inf=True), RoundSettings(micro_steps=2)]
        ),
    )
    def push(
        self, rank: int, back: int, old: int, stale: bool, seed: int, settings: RoundSettings
    ) -> None:
        incarnation, decided, epoch = (
            self.newest[rank] - old,
            self.round + 1 - back,
            self.epoch - stale,
        )
        message = Push(
            epoch=epoch,
            rank=rank,
            incarnation=incarnation,
            round=decided,
            gradients=None if settings.found_inf else {"float32": values(seed)},
            rejection="it overflowed" if settings.found_inf else None,
            settings=settings,
        )
        before = state_of(self.host)
        answer = self.host.send(message)
        if (rank, incarnation, decided) in self.counted:
            assert answer.result(0).round == self.round
        elif stale:
            self.refused(answer, StaleEpoch, before)
        elif old:
            self.refused(answer, SupersededWorker, before)
        elif back > 0:
            self.refused(answer, LatePush, before)
        elif back < 0:
            self.refused(answer, RoundMismatch, before)
        else:
            held = self.pending.get(rank)
            if held is None or held.incarnation < incarnation:
                self.pending[rank] = message
                for superseded in [f for r, f in self.waiting if r == rank]:
                    assert isinstance(superseded.exception(0), SupersededWorker)
                self.waiting = [(r, f) for r, f in self.waiting if r != rank]
            self.waiting.append((rank, answer))
            if len(self.pending) == RANKS:
                self.decided()

    def refused(
        self, answer: Future[Any], kind: type[ProtocolError], before: dict[str, Any]
    ) -> None:
        assert isinstance(answer.exception(0), kind)
        assert state_of(self.host) == before

    def decided(self) -> None:
        self.round += 1
        self.counted |= {
            (rank, push.incarnation, self.round) for rank, push in self.pending.items()
        }
        self.rounds.append([push for _, push in sorted(self.pending.items())])
        settings = [push.settings for push in self.pending.values()]
        outcome = (
            "voted"
            if any(each.found_inf for each in settings)
            else "applied"
            if len({each.micro_steps for each in settings}) == 1
            else "disagreed"
        )
        for _, answer in self.waiting:
            ended = answer.result(0)
            assert isinstance(ended, RoundResult)
            assert (ended.round, ended.outcome) == (self.round, outcome)
        self.pending, self.waiting = {}, []

    @rule()
    def replace_the_state_by_itself(self) -> None:
        self.host.send(Pause("x")).result(0)
        arrays = self.host.send(Read("x", STATE_ARRAYS)).result(0)
        self.host.send(
            Write(
                token="x",
                state={name: {"float32": flat["float32"].copy()} for name, flat in arrays.items()},
            )
        ).result(0)
        self.host.send(Resume("x")).result(0)
        self.epoch += 1
        assert all(isinstance(f.exception(0), StaleEpoch) for _, f in self.waiting)
        self.pending, self.waiting = {}, []

    @invariant()
    def the_state_is_that_of_each_round_counted_once(self) -> None:
        clean = new_host()
        for rank in range(RANKS):
            clean.send(Join(rank=rank)).result(0)
        for decided, pushes in enumerate(self.rounds, start=1):
            for push in pushes:
                answer = clean.send(
                    Push(
                        epoch=1,
                        rank=push.rank,
                        incarnation=1,
                        round=decided,
                        gradients=push.gradients,
                        rejection=push.rejection,
                        settings=push.settings,
                    )
                )
            answer.result(0)
        assert state_of(clean) == state_of(self.host)


OnceAgainstAModel.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
TestOnce = OnceAgainstAModel.TestCase


def test_a_push_repeated_while_it_waits_counts_once_and_both_are_answered() -> None:
    host = new_host()
    for rank in range(RANKS):
        host.send(Join(rank=rank)).result(0)
    answers = [
        host.send(
            Push(epoch=1, rank=rank, incarnation=1, round=1, gradients={"float32": values(rank)})
        )
        for rank in (0, 0, 1, 1, 2)
    ]
    assert {answer.result(0).round for answer in answers} == {1}
    once = state_of(host)
    assert (
        host.send(Push(epoch=1, rank=0, incarnation=1, round=1, gradients={"float32": values(99)}))
        .result(0)
        .round
        == 1
    )
    assert state_of(host) == once


@pytest.mark.on_ray(slow=["ray"])
def test_a_worker_taken_over_is_refused_by_name_and_its_successor_counts(backend: str) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        old, other = optimizer.worker(0), optimizer.worker(1)
        new = optimizer.worker(0)
        with pytest.raises(
            SupersededWorker, match="rank 0 was taken over by worker 2; worker 1 must stop"
        ):
            old.push(gradients(0, 0)).result()
        tickets = [new.push(gradients(0, 0)), other.push(gradients(0, 1))]
        assert [ticket.result() for ticket in tickets] == [1, 1]


def test_a_push_that_waits_when_its_worker_is_taken_over_is_replaced_by_the_successors() -> None:
    with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
        optimizer.worker(0).push(gradients(7, 0))
        new, other = optimizer.worker(0), optimizer.worker(1)
        new.push(gradients(0, 0))
        other.push(gradients(0, 1)).result()
        got = bits(optimizer)
    with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
        optimizer.worker(0).push(gradients(0, 0))
        optimizer.worker(1).push(gradients(0, 1)).result()
        assert bits(optimizer) == got


@pytest.mark.on_ray(slow=["ray"])
def test_a_push_that_was_superseded_while_it_waited_is_refused_by_name(backend: str) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        old, other = optimizer.worker(0), optimizer.worker(1)
        waiting = old.push(gradients(7, 0))
        while any(0 in shard.waiting_for for shard in optimizer.shards.describe_all()):
            pass  # until every shard has it; the test's time limit bounds it
        new = optimizer.worker(0)
        tickets = [new.push(gradients(0, 0)), other.push(gradients(0, 1))]
        assert [ticket.result() for ticket in tickets] == [1, 1]
        with pytest.raises(
            SupersededWorker,
            match="rank 0 was taken over by worker 2; the push of worker 1 was not counted",
        ):
            waiting.result()


@pytest.mark.on_ray(slow=["ray-clip1"])
@pytest.mark.parametrize("clip", [{"clipnorm": 1.0}, {"global_clipnorm": 1.0}])
def test_a_worker_gone_between_push_and_norms_holds_nobody_up_and_its_push_counts(
    clip: dict[str, float], backend: str
) -> None:
    ends = []
    for gone in (True, False):
        with DistNadam(num_shards=2, backend=backend, **clip).build(params()) as optimizer:
            ticket = optimizer.worker(0).push(gradients(0, 0))
            if not gone:
                ticket.result()
            successor = optimizer.worker(0)
            if gone:
                with pytest.raises(
                    LatePush,
                    match="round 1 was completed with the push of worker 1; this push did not "
                    "count",
                ):
                    successor.push(gradients(9, 0)).result()
            successor.push(gradients(1, 0)).result()
            ends.append(bits(optimizer))
    assert ends[0] == ends[1]


def test_a_step_from_outside_that_was_not_seen_through_holds_nobody_up() -> None:
    with DistNadam(num_shards=2, backend="local", clipnorm=1.0).build(params()) as optimizer:
        shards = optimizer.shards
        with shards.boundary() as at:
            parts = [
                {s: np.ones(e - b, s) for s, (b, e) in ranges.items()} for ranges in shards.ranges
            ]
            shards.ask(
                {
                    i: Step(token=at.token, incarnation=1, round=1, gradients=part)
                    for i, part in enumerate(parts)
                }
            )
        assert optimizer.iterations == 0
        assert optimizer.apply_gradients(gradients(0, 0)) == 1
        assert optimizer.worker(0).push(gradients(1, 0)).result() == 2


def test_steps_from_outside_and_pushes_at_once_are_each_whole_or_refused() -> None:
    """Every round is one side's on every shard: all of m has the value of one history of whole
    steps.
    """
    size = 20_000
    with DistNadam(num_shards=4, backend="local", options=Options(threads=1)).build(
        {"w": np.zeros(size, np.float32)}
    ) as optimizer:

        def from_outside(value: float) -> None:
            for _ in range(40):
                with contextlib.suppress(PushesPending):
                    optimizer.apply_gradients({"w": np.full(size, value, np.float32)})

        def push() -> None:
            with optimizer.worker(0) as worker:
                for _ in range(40):
                    with contextlib.suppress(LatePush):
                        worker.step({"w": np.full(size, -1.0, np.float32)})

        threads = [
            threading.Thread(target=from_outside, args=(value,)) for value in (1.0, -3.0)
        ] + [threading.Thread(target=push)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _, _, m, v = optimizer.get_weights()
        assert np.ptp(m) == np.ptp(v) == np.ptp(optimizer.get_params()["w"]) == 0
        assert optimizer.iterations >= 80


def test_a_hold_that_was_given_up_does_not_take_the_gate_later() -> None:
    with DistNadam(num_shards=2, backend="local", options=Options(step_timeout_s=0.2)).build(
        params()
    ) as optimizer:
        with (
            optimizer.shards.boundary(),
            pytest.raises(StepTimeout, match=r"did not all answer Pause in 0\.2 s"),
        ):
            optimizer.get_params()
        assert optimizer.get_params()
        assert optimizer.apply_gradients(gradients(0, 0)) == 1


def test_a_push_from_before_the_state_was_replaced_is_refused_and_the_next_counts(
    backend: str,
) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        early = workers[0].push(gradients(0, 0))
        optimizer.set_params(optimizer.get_params())
        with pytest.raises(StaleEpoch, match="pull and compute again"):
            early.result()
        tickets = [worker.push(gradients(0, worker.rank)) for worker in workers]
        assert [ticket.result() for ticket in tickets] == [1, 1]
