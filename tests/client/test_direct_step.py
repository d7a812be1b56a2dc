"""Direct steps of an only shard, which is not held for them: each counts once, whoever else acts
and whichever calls or answers are lost.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.backends.base import Pending
from distnadam.client.shard_group import ShardGroup
from distnadam.config import NadamConfig, Options
from distnadam.errors import DistNadamError, IllegalMessage, PushesPending, ShardUnavailable
from distnadam.protocol.messages import Pause, Step
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
        self.group = ShardGroup(WorldBackend(world), layout, 1, options, poll_s=0.0)
        self._post = self.group.backend.transport.post
        self.group.backend.transport.post = self._lossy  # type: ignore[method-assign]
        self.fault: Fault = "none"
        self.posted: list[type] = []
        self.late: list[Mapping[int, Any]] = []

    def _lossy(self, messages: Mapping[int, Any]) -> Pending:
        kind = type(messages[0])
        self.posted.append(kind)
        fault, is_step = self.fault, kind is Step
        if fault == "none" or not is_step:
            return self._post(messages)
        self.fault = "none"
        error = Interrupted() if "interrupted" in fault else ShardUnavailable("lost by this test")
        is_sent = fault in ("answer lost", "interrupted after")
        if fault == "interrupted and late":
            self.late.append(messages)
        return Unheard(self._post(messages) if is_sent else None, error)

    def arrive(self) -> None:
        """Have the step that is late arrive, if there is one; whoever sent it does not hear."""
        for messages in self.late:
            with suppress(DistNadamError):
                self._post(messages).result(1.0)
        self.late = []


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
        ),
        max_size=12,
    )
)
@settings(max_examples=300, deadline=None)
def test_each_step_of_several_handles_counts_once_whatever_is_lost(
    calls: list[tuple[int, Fault, bool]],
) -> None:
    options = Options(kernel="numpy", step_timeout_s=5.0)
    world, layout = begin_world(W, NadamConfig(), options, 1, 1, 0)
    handles = [Handle(world, layout, options) for _ in range(3)]
    counted: list[int] = []
    late: list[int] = []  # at most one at a time
    for number, (who, fault, arrives) in enumerate(calls):
        if arrives:
            for handle in handles:
                handle.arrive()
            if late and handles[who].group.read(("m",))[0].iterations > len(counted):
                counted += late
            late = []
        if late and fault == "interrupted and late":
            continue
        handles[who].fault = fault
        try:
            decided = handles[who].group.step(gradient(number))
        except Interrupted:
            if fault == "interrupted after":
                counted.append(number)
            if fault == "interrupted and late":
                late = [number]
        else:
            counted.append(number)
            assert decided.iterations == len(counted)
    clock, state = handles[0].group.read(("params",))
    assert clock.iterations == len(counted)
    assert state["params"]["float32"].tobytes() == undisturbed(counted)


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
