"""An ordinary round in one go: a host then holds and says what it would by messages alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders
from distnadam.config import Options
from distnadam.errors import ConfigError, KernelError
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam import stepper
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.phases import Phase
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"a": np.ones(3, np.float32), "b": np.ones(2, np.float64)})
WORKERS = 2


class Driven:
    """A host that messages are given to, and all that it has answered, by the message's number."""

    def __init__(self, *, at_once: bool, **config: Any) -> None:
        self._at_once = at_once
        ranges = LAYOUT.cuts(1)[0]
        spec = ShardSpec(
            index=0,
            num_shards=1,
            num_workers=WORKERS,
            replicas=0,
            name=None,
            config=NadamConfig(**config),
            options=Options(threads=1, kernel="numpy"),
            layout=LAYOUT,
            ranges=ranges,
        )
        self.host = ShardHost(spec)
        self.answers: dict[int, Any] = {}
        self.taken = 0
        self._sent = 0
        for message in (
            orders.Load(epoch=1, params=LAYOUT.flat({"a": np.ones(3), "b": np.ones(2)}, what="p")),
            *(msg.Join(rank=rank, process="p") for rank in range(WORKERS)),
        ):
            self.give(message)

    def give(self, message: Any) -> Any:
        number = self._sent
        self._sent += 1
        if self._at_once and isinstance(message, (msg.Push, msg.Step)):
            try:
                result = self.host.step_at_once(message)
            except Exception as error:
                result = error
            if result is not None:
                self.taken += 1
                self.answers[number] = result
                return result
        self.host.deliver(message, lambda answer: self.answers.__setitem__(number, answer))
        return self.answers.get(number)

    def all_of_it(self) -> Any:
        """What it holds, and what it has said."""
        shard = self.host.shard
        arrays = {
            (name, space): values.tobytes()
            for name, flat in shard.state.arrays().items()
            for space, values in flat.items()
        }
        said = {
            number: (type(answer), str(answer)) if isinstance(answer, Exception) else answer
            for number, answer in self.answers.items()
        }
        state = dataclasses.replace(shard.progress.control_state())
        return arrays, said, state, shard.phase, sorted(shard.rounds.current.pushes)


def gradients(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {space: rng.standard_normal(n).astype(space) for space, n in LAYOUT.sizes.items()}


def rated(which: int) -> RoundSettings:
    """Learning rates and betas of one step alone; with 2, and something else."""
    rates = packed_overrides(0.1 + which % 2, (0.5, 0.75), None)
    return RoundSettings(overrides=rates, micro_steps=1 + which // 2)


Acts = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 1), st.sampled_from([0, 0, 0, 0, 0, -1, 1])),
        st.tuples(st.just("all"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("rejected"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("voted"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("rated"), st.integers(0, 1), st.integers(0, 2)),
        st.tuples(st.just("all rated"), st.integers(0, 1), st.sampled_from([0, 0, 1, 2])),
        st.tuples(st.just("rated step"), st.integers(0, 1), st.integers(0, 2)),
        st.tuples(st.just("stale"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("step"), st.sampled_from([0, 0, 1]), st.booleans()),
        st.tuples(st.just("join"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("pull"), st.integers(0, 1), st.integers(0, 1)),
        st.tuples(st.just("pause"), st.just(0), st.just(0)),
        st.tuples(st.just("resume"), st.just(0), st.just(0)),
        st.tuples(st.just("members"), st.integers(1, 2), st.just(0)),
        st.tuples(st.just("clip"), st.booleans(), st.just(0)),
    ),
    max_size=25,
)


def messages_of(driven: Driven, act: tuple[str, int, int], seed: int) -> list[Any]:
    """What an act sends, as a host stands; both hosts stand alike."""
    what, which, by = act
    shard = driven.host.shard
    number, epoch = shard.progress.round + 1, shard.epochs.now
    newest = shard.members.ledger.newest

    def push(rank: int, **other: Any) -> msg.Push:
        given: dict[str, Any] = {
            "epoch": epoch,
            "rank": rank,
            "incarnation": newest[rank],
            "round": number,
            "gradients": gradients(2 * seed + rank),
        }
        return msg.Push(**(given | other))

    def step() -> msg.Step:
        return msg.Step(
            token=None if by else "me",
            incarnation=100 + seed,
            round=number,
            gradients=gradients(seed),
            in_place=bool(seed % 2),
            epoch=epoch - which,
        )

    def pull() -> msg.Pull:
        return msg.Pull(
            rank=which,
            incarnation=newest[which],
            at_least=number if by else 0,
            want_parameters=False,
            epoch=epoch,
        )

    def members() -> orders.Reconfigure:
        schedule = ((1, (0, 1)), (number, tuple(range(which))))
        return orders.Reconfigure(epoch=epoch + 1, schedule=schedule, newest={})

    def clip() -> msg.SetConfig:
        config = dataclasses.replace(shard.config, clipnorm=1.0 if which else None)
        return msg.SetConfig("me", config, shard.progress.revision + 1)

    makers: dict[str, Callable[[], list[Any]]] = {
        "push": lambda: [push(which, round=number + by)],
        "all": lambda: [push(which), push(1 - which)],
        "rejected": lambda: [push(which, gradients=None, rejection="not finite")],
        "voted": lambda: [push(which, settings=RoundSettings(found_inf=True))],
        "rated": lambda: [push(which, settings=rated(by))],
        "all rated": lambda: [
            push(which, settings=rated(0)),
            push(1 - which, settings=rated(by)),
        ],
        "rated step": lambda: [dataclasses.replace(step(), epoch=epoch, settings=rated(by))],
        "stale": lambda: [push(which, epoch=epoch - 1)],
        "step": lambda: [step()],
        "join": lambda: [msg.Join(rank=which, process="p")],
        "pull": lambda: [pull()],
        "pause": lambda: [msg.Pause("me")],
        "resume": lambda: [msg.Resume("me")],
        "members": lambda: [members()],
        "clip": lambda: [clip()],
    }
    return makers[what]()


@settings(max_examples=100, deadline=None)
@given(Acts)
@example([("push", 1, 0), ("join", 1, 0), ("all", 0, 0)])
def test_a_host_that_steps_at_once_stands_and_says_as_one_that_does_not(acts: Any) -> None:
    hosts = [Driven(at_once=at_once) for at_once in (True, False)]
    for seed, act in enumerate(acts):
        for message in messages_of(hosts[1], act, seed):
            for driven in hosts:
                driven.give(message)
            assert hosts[0].all_of_it() == hosts[1].all_of_it()


def ordinary(driven: Driven, rank: int, **other: Any) -> msg.Push:
    [push] = messages_of(driven, ("push", rank, 0), 1)
    return dataclasses.replace(push, **other)


def test_the_last_push_of_a_round_steps_at_once_and_the_first_waits_for_it() -> None:
    driven = Driven(at_once=True)
    assert driven.give(ordinary(driven, 1)) is None
    assert driven.taken == 0
    result = driven.give(ordinary(driven, 0))
    assert (driven.taken, result.round, result.outcome) == (1, 1, "applied")
    assert result in list(driven.answers.values())[-2:-1]  # what the first gets too


def test_rates_of_one_step_are_taken_at_once_where_all_ranks_have_the_same_bits() -> None:
    driven = Driven(at_once=True)
    for number in (0, 1):
        driven.give(ordinary(driven, 1, settings=rated(number)))
        result = driven.give(ordinary(driven, 0, settings=rated(number)))
        assert (driven.taken, result.lr) == (number + 1, 0.1 + number)
        assert driven.host.shard.progress.overrides == rated(number).overrides
    for mine, other in ((rated(0), rated(1)), (rated(0), ORDINARY), (ORDINARY, rated(0))):
        driven.give(ordinary(driven, 1, settings=other))
        result = driven.give(ordinary(driven, 0, settings=mine))
        assert (driven.taken, result.outcome) == (2, "disagreed")


UNUSUAL: dict[str, Any] = {
    "a round to come": {"round": 3},
    "another epoch": {"epoch": 0},
    "an older worker": {"incarnation": 0},
    "rejected": {"gradients": None, "rejection": "not finite"},
    "settings": {"settings": RoundSettings(micro_steps=2)},
    "parameters are to come": {"want_parameters": True},
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_not_taken_and_changes_nothing(what: str) -> None:
    driven = Driven(at_once=True)
    driven.give(ordinary(driven, 1))
    before = driven.all_of_it()
    assert driven.host.step_at_once(ordinary(driven, 0, **UNUSUAL[what])) is None
    assert driven.all_of_it() == before


@pytest.mark.parametrize("message", [msg.Pause("me"), orders.AbandonRank(0, 1)])
def test_a_shard_that_is_held_or_lacks_a_rank_steps_nothing_at_once(message: Any) -> None:
    driven = Driven(at_once=True)
    push = ordinary(driven, 0)
    driven.give(message)
    driven.give(ordinary(driven, 1))
    assert driven.host.step_at_once(push) is None


def test_a_closed_host_refuses_by_its_usual_way() -> None:
    driven = Driven(at_once=True)
    driven.give(ordinary(driven, 1))
    push = ordinary(driven, 0)
    driven.host.close()
    assert driven.host.step_at_once(push) is None


def test_a_learning_rate_that_raises_drops_the_round_for_all() -> None:
    def rate(step: int) -> float:
        raise ValueError("no rate")

    driven = Driven(at_once=True, lr=rate)
    driven.give(ordinary(driven, 1))
    error = driven.give(ordinary(driven, 0))
    assert isinstance(error, ConfigError)
    assert [type(answer) for answer in driven.answers.values()][-2:] == [ConfigError, ConfigError]
    assert driven.host.shard.phase is Phase.COLLECTING
    assert not driven.host.shard.rounds.current.pushes


def test_a_step_that_fails_half_way_breaks_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(at_once=True)
    driven.give(ordinary(driven, 1))
    monkeypatch.setattr(stepper, "_ONE", 0.0)  # as if denormals were flushed
    assert isinstance(driven.give(ordinary(driven, 0)), KernelError)
    assert driven.host.shard.phase is Phase.BROKEN
