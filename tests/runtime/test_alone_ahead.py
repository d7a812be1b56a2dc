"""Rounds that one message of this process each makes up, and that are stepped ahead of their
counting, are to everyone those taken one by one.
"""

import dataclasses
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders
from distnadam import DistNadam, Group, Options
from distnadam.errors import KernelError
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam import stepper
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.round_settings import RoundSettings
from distnadam.runtime.alone_ahead import AloneAhead, RoundsAlone
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.phases import Phase
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"a": np.ones(3, np.float32), "b": np.ones(2, np.float64)})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that were stepped ahead, in order."""
    found: list[int] = []
    take = AloneAhead.take

    def watched(self: AloneAhead, message: Any) -> Any:
        result = take(self, message)
        if result is not None:
            found.append(result.round)
        return result

    monkeypatch.setattr(AloneAhead, "take", watched)
    return found


def memory(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {space: rng.standard_normal(n).astype(space) for space, n in LAYOUT.sizes.items()}


class Driven:
    """A host of an only worker that messages are given to, and all that it has answered."""

    def __init__(self, *, ahead: bool, **config: Any) -> None:
        spec = ShardSpec(
            index=0,
            num_shards=1,
            num_workers=1,
            replicas=0,
            name=None,
            config=NadamConfig(**config),
            options=Options(threads=1, kernel="numpy"),
            layout=LAYOUT,
            ranges=LAYOUT.cuts(1)[0],
        )
        self.host = ShardHost(spec)
        self.rounds = RoundsAlone(self.host)
        self._at_once = self.rounds.step_at_once if ahead else self.host.step_at_once
        self.said: list[Any] = []
        params = LAYOUT.flat({"a": np.ones(3), "b": np.ones(2)}, what="p")
        self.give(orders.Load(epoch=1, params=params))
        self.give(msg.Join(rank=0, process="p"))

    def give(self, message: Any) -> Any:
        answer: Any = None
        if isinstance(message, (msg.Push, msg.Step)):
            try:
                answer = self._at_once(message)
            except Exception as error:
                answer = error
        if answer is None:
            answers: list[Any] = []
            self.host.deliver(message, answers.append)
            answer = answers[0] if answers else None
        if isinstance(answer, Exception):
            answer = type(answer), str(answer)
        if isinstance(answer, msg.Description):
            answer = dataclasses.replace(answer, idle_s=0.0, stepped_s=0.0)
        self.said.append(answer)
        return answer

    def all_of_it(self) -> Any:
        """What it holds, once all is counted, and what it has said."""
        self.rounds.stop()
        shard = self.host.shard
        arrays = {
            (name, space): values.tobytes()
            for name, flat in shard.state.arrays().items()
            for space, values in flat.items()
        }
        return arrays, self.said, shard.progress.control_state(), shard.phase


Acts = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["push"] * 6 + ["again", "older", "rated"]), st.integers(0, 1)),
        st.tuples(st.sampled_from(["step"] * 6 + ["in place", "other"]), st.integers(0, 1)),
        st.tuples(st.just("many pushes"), st.integers(0, 9)),
        st.tuples(st.just("many steps"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["describe", "pull", "join", "hold", "rate"]), st.just(0)),
    ),
    max_size=20,
)


class Sender:
    """Makes the same messages for several hosts, as its own count of their rounds has it."""

    def __init__(self) -> None:
        self.round, self.step, self.revision = 0, 1000, 0
        self.incarnation = 1
        self._lent = [memory(0), memory(1)]

    def messages(self, what: str, which: int) -> list[Any]:
        if what.startswith("many"):
            kind = "push" if what == "many pushes" else "step"
            return [each for _ in range(which) for each in self.messages(kind, 0)]
        if what == "hold":
            return [msg.Pause("me"), *self.messages("push", 0), msg.Resume("me")]
        if what == "rate":
            self.revision += 1
            config = NadamConfig(lr=0.1 / self.revision)
            change = msg.SetConfig("me", config, self.revision)
            return [msg.Pause("me"), change, msg.Resume("me")]
        if what == "describe":
            return [msg.Describe()]
        if what == "pull":
            return [
                msg.Pull(
                    rank=0,
                    incarnation=self.incarnation,
                    at_least=0,
                    want_parameters=False,
                    epoch=1,
                )
            ]
        if what == "join":
            self.incarnation += 1
            return [msg.Join(rank=0, process="p")]
        if what in ("push", "again", "older", "rated"):
            self.round += what != "again"
            rated = RoundSettings(overrides=packed_overrides(0.5, None, None))
            push = msg.Push(
                epoch=1,
                rank=0,
                incarnation=self.incarnation - (what == "older"),
                round=self.round,
                gradients=self._gradients(which),
            )
            self.round -= what == "older"
            return [dataclasses.replace(push, settings=rated) if what == "rated" else push]
        self.round += 1
        self.step += 7 if what == "other" else 1
        return [
            msg.Step(
                token=None,
                incarnation=self.step,
                round=self.round,
                gradients=self._gradients(which),
                in_place=what == "in place",
                epoch=1,
            )
        ]

    def _gradients(self, which: int) -> dict[str, Any]:
        """The same memory, and what the round has in it."""
        for values in self._lent[which].values():
            values *= 0.75 + 0.5 / (1 + self.round)
        return self._lent[which]


@settings(max_examples=150, deadline=None)
@given(Acts)
@example([("many pushes", 9), ("many steps", 9), ("push", 0)])
@example([("many steps", 4), ("in place", 0), ("in place", 0), ("in place", 0), ("in place", 0)])
@example([("many pushes", 5), ("again", 0), ("push", 0)])
def test_a_host_that_goes_ahead_stands_and_says_as_one_that_does_not(acts: Any) -> None:
    hosts, sender = [Driven(ahead=ahead) for ahead in (True, False)], Sender()
    for what, which in acts:
        for message in sender.messages(what, which):
            for driven in hosts:
                driven.give(message)
        assert hosts[0].said == hosts[1].said
    assert hosts[0].all_of_it() == hosts[1].all_of_it()


def test_messages_whose_gradients_lie_in_the_same_memory_go_ahead(taken: list[int]) -> None:
    driven, sender = Driven(ahead=True), Sender()
    for kind in ("many pushes", "many steps"):
        for message in sender.messages(kind, 6):
            driven.give(message)
    assert taken == [3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert driven.give(msg.Describe()).round == 12
    for message in sender.messages("many steps", 2):
        driven.give(message)
    assert taken[9:] == [14], "somebody has looked"


def test_a_step_that_fails_breaks_the_shard_and_the_rounds_before_it_count(
    taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, sender = Driven(ahead=True), Sender()
    for message in sender.messages("many pushes", 5):
        driven.give(message)
    assert taken
    monkeypatch.setattr(stepper, "_ONE", 0.0)  # as if denormals were flushed
    [push] = sender.messages("push", 0)
    assert driven.give(push)[0] is KernelError
    shard = driven.host.shard
    assert (shard.phase, shard.progress.round, shard.state.active) == (Phase.BROKEN, 5, 1)


def test_gradients_of_a_message_that_does_not_go_ahead_are_nobodys_afterwards() -> None:
    driven, sender = Driven(ahead=True), Sender()
    [push] = sender.messages("push", 0)
    lent = np.ones(3, np.float32)
    push.gradients = {**push.gradients, "float32": lent}
    seen = weakref.ref(lent)
    assert driven.give(push).round == 1
    del lent, push
    gc.collect()
    assert seen() is None


SETTINGS: dict[str, dict[str, Any]] = {
    "nadam": {},
    "three shards": {"num_shards": 3},
    "adamw": {"formula": "adam", "weight_decay": 0.1},
    "L2": {
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
        "maximize": True,
        "clipvalue": 0.5,
    },
    "groups": {"groups": [Group("b", lr_scale=0.5)]},
    "betas of a group": {"groups": [Group("b", beta_1=0.5)]},
    "clocks": {"clocks": "tensor"},
    "average": {"use_ema": True, "ema_overwrite_frequency": 4},
    "bfloat16": {"pull_dtype": "bfloat16"},
    "norms": {"clipnorm": 0.5},
    "schedule": {"lr": lambda step: 0.1 / (1 + step)},
}


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("name", SETTINGS)
def test_bits_do_not_tell_whether_somebody_looked_after_each_step(kernel: str, name: str) -> None:
    if kernel == "fused":
        pytest.importorskip("llvmlite")
    ends = [run(kernel, SETTINGS[name], looks=looks) for looks in (False, True)]
    assert ends[0] == ends[1]


def run(kernel: str, given: dict[str, Any], *, looks: bool) -> Any:
    """Step directly, by a worker's steps, its pushes, and directly; return what comes of it."""
    start = {"b": np.linspace(-1, 1, 7), "w": np.linspace(-1, 1, 700, dtype=np.float32)}
    rng, options = np.random.default_rng(0), Options(kernel=kernel)
    with DistNadam(backend="local", options=options, **given).build(start) as optimizer:

        def steps(step: Any) -> None:
            for _ in range(9):
                step({k: rng.standard_normal(v.shape).astype(v.dtype) for k, v in start.items()})
                assert not looks or optimizer.iterations

        steps(optimizer.apply_gradients)
        with optimizer.worker(0) as worker:
            steps(worker.step)
            steps(lambda tree: worker.push(tree).result())
            seen = [leaf.tobytes() for leaf in worker.pull().values()]
        steps(optimizer.apply_gradients)
        if "groups" not in given and "clocks" not in given:
            seen += [leaf.tobytes() for leaf in optimizer.get_weights()]
        params = optimizer.get_params()
        return seen, optimizer.iterations, [leaf.tobytes() for leaf in params.values()]
