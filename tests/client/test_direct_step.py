"""Direct steps of an only shard, which is not held for them: each counts once, whoever else acts
and whichever calls or answers are lost.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.backends.base import Pending
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options
from distnadam.errors import (
    DistNadamError,
    IllegalMessage,
    PushesPending,
    ShardUnavailable,
    StepTimeout,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Pause, Push, Step
from distnadam.shard.ledger import DIRECT
from distnadam.shard.round import Round, Waiter
from distnadam.worker import Worker
from tests.client.test_shard_group import local
from tests.simulation.backend import WorldBackend, begin_world

W = np.linspace(-1, 1, 50, dtype=np.float32)
Fault = Literal[
    "none", "call lost", "answer lost", "interrupted", "interrupted after", "interrupted and late"
]


class Interrupted(Exception):
    """What a time limit of the caller's raises."""


class Unheard(Pending):
    """Answers that come, or do not, and are not heard."""

    def __init__(self, pending: Pending | None, error: Exception) -> None:
        self._pending, self._error = pending, error

    def result(self, timeout_s: float) -> dict[int, Any]:
        if self._pending is not None:
            self._pending.result(timeout_s)
        raise self._error


class Handle:
    """A handle of a simulated shard, whose next step may befall something."""

    def __init__(self, world: Any, layout: Any, options: Options) -> None:
        self.group = ShardGroup(WorldBackend(world), layout, options, poll_s=0.0)
        transport = self.group.backend.transport
        self._post, self._recover = transport.post, transport.await_recovery
        transport.post = self._lossy  # type: ignore[method-assign]
        transport.await_recovery = self._after_others  # type: ignore[method-assign]
        self.fault: Fault = "none"
        self.posted: list[type] = []
        self.late: list[Mapping[int, Any]] = []
        self.on_taken: Callable[[], None] = bool  # a step whose caller does not hear of it
        self.meanwhile: Callable[[], None] = bool  # before what was lost is made good

    def _lossy(self, messages: Mapping[int, Any]) -> Pending:
        kind = type(messages[0])
        self.posted.append(kind)
        fault, is_step = self.fault, kind is Step
        if fault == "none" or not is_step:
            return self._post(messages)
        self.fault = "none"
        error = Interrupted() if "interrupted" in fault else ShardUnavailable("lost by this test")
        if fault in ("answer lost", "interrupted after"):
            self.on_taken()
            return Unheard(self._post(messages), error)
        if fault == "interrupted and late":
            step = messages[0]  # on its way to another process: a copy
            copy = {space: values.copy() for space, values in (step.gradients or {}).items()}
            self.late.append({0: replace(step, gradients=copy)})
        return Unheard(None, error)

    def _after_others(self, timeout_s: float) -> None:
        act, self.meanwhile = self.meanwhile, bool
        act()
        self._recover(timeout_s)

    def arrive(self) -> None:
        """Have the step that is late arrive, if there is one; whoever sent it does not hear."""
        for messages in self.late:
            with suppress(DistNadamError):
                self._post(messages).result(1.0)
        self.late = []


class Run:
    """Three handles of one shard, and the steps that count, in order."""

    def __init__(self) -> None:
        options = Options(kernel="numpy", step_timeout_s=5.0)
        world, layout = begin_world(W, NadamConfig(), options, 1, 1, 0)
        self.handles = [Handle(world, layout, options) for _ in range(3)]
        self.counted: list[int] = []
        self.late: list[int] = []  # at most one at a time

    def step(self, who: int, number: int) -> None:
        """Take a step, whatever befalls it."""
        handle = self.handles[who]
        handle.on_taken = partial(self.counted.append, number)
        is_late = handle.fault == "interrupted and late"
        try:
            decided = handle.group.step(gradient(number))
        except Interrupted:
            self.late += [number] if is_late else []
            return
        if number not in self.counted:
            self.counted.append(number)
        assert decided.iterations == len(self.counted)

    def arrive(self) -> None:
        """Have a step arrive that its caller has given up; the shard may take it or not."""
        for handle in self.handles:
            handle.arrive()
        if self.late and self.iterations > len(self.counted):
            self.counted += self.late
        self.late = []

    @property
    def iterations(self) -> int:
        return self.handles[0].group.read(("m",))[0].iterations


def gradient(number: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(number).standard_normal(50).astype(np.float32)}


def undisturbed(numbers: list[int]) -> bytes:
    with DistNadam(backend="local").build({"w": W}) as optimizer:
        for number in numbers:
            optimizer.apply_gradients(gradient(number))
        return bytes(optimizer.get_params()["w"].tobytes())


@given(
    calls=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["none", *get_args(Fault)]),
            st.booleans(),
            st.sampled_from([None, 0, 1, 2]),
        ),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_each_step_of_several_handles_counts_once_whatever_is_lost(
    calls: list[tuple[int, Fault, bool, int | None]],
) -> None:
    run = Run()
    for number, (who, fault, arrives, other) in enumerate(calls):
        if arrives:
            run.arrive()
        if not (run.late and fault == "interrupted and late"):
            run.handles[who].fault = fault
        if other not in (None, who):
            run.handles[who].meanwhile = partial(run.step, other, 1000 + number)
        run.step(who, number)
    _, state = run.handles[0].group.read(("params",))
    assert run.iterations == len(run.counted)
    assert state["params"]["float32"].tobytes() == undisturbed(run.counted)


def test_an_only_shard_is_held_for_a_handles_first_step_alone() -> None:
    options = Options(kernel="numpy")
    world, layout = begin_world(W, NadamConfig(), options, 1, 1, 0)
    first, second = (Handle(world, layout, options) for _ in range(2))
    for number in range(3):
        first.group.step(gradient(number))
    assert first.posted.count(Pause) == 1 and first.posted.count(Step) == 3
    second.group.step(gradient(3))
    first.posted.clear()
    first.group.step(gradient(4))
    assert first.posted.count(Pause) == 1, "somebody else has stepped"


def test_a_step_is_refused_while_pushes_wait_and_goes_on_from_what_was_written() -> None:
    group = local(1)
    w = np.arange(5000, dtype=np.float32)
    assert [group.step({"w": w}).round for _ in range(2)] == [1, 2]
    ticket = Worker(group, 1).push({"w": w})
    with pytest.raises(PushesPending, match="ranks 1 have pushed for round 3"):
        group.step({"w": w})
    Worker(group, 0).push({"w": w})
    assert ticket.result() == 3
    group.fill({"m": {"float32": w}})
    assert group.step({"w": w}).iterations == 4
    with group.boundary() as at:
        message = Step(token=None, incarnation=99, round=5, gradients={"float32": w}, epoch=2)
        with pytest.raises(IllegalMessage, match="somebody holds it"):
            group.ask({0: message})
        assert at.held.round == 4
    with pytest.raises(IllegalMessage, match=r"a step of epoch 1 came in epoch 2"):
        group.ask({0: Step(token=None, incarnation=99, round=5, gradients=None, epoch=1)})
    assert group.step({"w": w}).iterations == 5


def test_several_shards_and_one_that_clips_by_norm_are_held_for_each_step() -> None:
    for settings_of in ({"num_shards": 2}, {"clipnorm": 0.5}):
        with DistNadam(backend="local", **settings_of).build({"w": W}) as optimizer:
            transport, posted = optimizer.shards.backend.transport, list[type]()
            post = transport.post

            def noted(messages: Mapping[int, Any], post: Any = post, to: Any = posted) -> Pending:
                to.append(type(messages[0]) if 0 in messages else type(None))
                return post(messages)  # type: ignore[no-any-return]

            transport.post = noted  # type: ignore[method-assign]
            for number in range(3):
                optimizer.apply_gradients(gradient(number))
            assert posted.count(Pause) == 3


def test_steps_of_two_threads_by_one_handle_are_whole_and_each_counts() -> None:
    size = 3000
    with DistNadam(backend="local").build({"w": np.zeros(size, np.float32)}) as optimizer:

        def apply(value: float) -> None:
            for _ in range(150):
                optimizer.apply_gradients({"w": np.full(size, value, np.float32)})

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(apply, [1.0, -1.0]))
        assert optimizer.iterations == 300
        assert len(np.unique(optimizer.get_weights()[2])) == 1, "each gradient came whole"


def test_a_replay_of_a_refused_step_says_so_though_others_have_stepped_since() -> None:
    run = Run()
    first = run.handles[0]
    first.group.step(gradient(0))
    first.fault = "answer lost"
    first.meanwhile = partial(run.handles[1].group.step, gradient(1))  # type: ignore[arg-type]
    decided = first.group.step({"w": np.full(50, np.nan, np.float32)})
    assert (decided.outcome, decided.iterations) == ("refused", 2)
    assert "is not finite" in str(decided.rejection)


def test_a_replay_of_an_applied_step_says_so_though_another_was_refused_since() -> None:
    run = Run()
    first, second = run.handles[:2]
    first.group.step(gradient(0))
    first.fault = "answer lost"
    bad = {"w": np.full(50, np.nan, np.float32)}
    first.meanwhile = partial(second.group.step, bad)  # type: ignore[arg-type]
    decided = first.group.step(gradient(1))
    assert (decided.outcome, decided.rejection, decided.iterations) == ("applied", None, 2)


def test_a_step_that_waits_for_itself_ends_in_time() -> None:
    asked: list[type[Exception]] = []

    def schedule(step: int) -> float:
        if step == 1:
            try:
                optimizer.apply_gradients({"w": W})
            except StepTimeout as error:
                asked.append(type(error))
        return 0.01

    options = Options(step_timeout_s=0.2)
    with DistNadam(lr=schedule, backend="local", options=options).build({"w": W}) as optimizer:
        assert [optimizer.apply_gradients({"w": W}) for _ in range(2)] == [1, 2]
    assert asked == [StepTimeout]


def test_a_worker_that_joins_holds_no_step_from_outside_for_abandoned() -> None:
    made = Round(0)
    waiter = Waiter(None, DIRECT, 7)
    made.add(
        Push(epoch=1, rank=DIRECT, incarnation=7, round=1, gradients={}),
        waiter,
    )
    assert not made.is_orphaned({DIRECT: 9})
