"""One round: which pushes count when workers are replaced, and what its callers get."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distnadam.errors import IllegalMessage, LatePush, SupersededWorker
from distnadam.nadam.mean import Grouping
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.messages import PartialNorms, Push
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.shard.effects import Answer, Effect
from distnadam.shard.round import Round, Waiter
from distnadam.shard.verdict import verdict_of
from distnadam.tensors.layout import Layout

NORMS = PartialNorms(1, ((0, np.array([3.0])),))


def push(
    rank: int,
    incarnation: int = 1,
    rejection: str | None = None,
    settings: RoundSettings = ORDINARY,
) -> Push:
    gradients = None if rejection else {"float32": np.full(2, rank, np.float32)}
    return Push(
        epoch=0,
        rank=rank,
        incarnation=incarnation,
        round=1,
        gradients=gradients,
        rejection=rejection,
        settings=settings,
    )


def waiter(rank: int, incarnation: int = 1) -> Waiter:
    return Waiter(f"{rank}.{incarnation}", rank, incarnation)


def round_of(*ranks: int) -> Round:
    """A round with these ranks' pushes, which come in this order."""
    made = Round(0)
    for rank in ranks:
        assert made.add(push(rank), waiter(rank)) == []
    return made


def values_of(made: Round, sum_group: int = 1) -> list[float]:
    """The first element of each array that the mean is made of, in its order."""
    return [flat["float32"][0] for flat in made.summands(sum_group)[0]]


def errors(effects: list[Effect]) -> dict[Any, type]:
    return {effect.caller: type(effect.reply) for effect in effects if isinstance(effect, Answer)}


def test_gradients_and_rejections_are_in_the_order_of_ranks() -> None:
    made = round_of(2, 0)
    assert values_of(made) == [0, 2]
    assert made.is_ordinary and verdict_of(made.pushes, "raise", 8) is None
    made.add(push(3, rejection="three"), waiter(3))
    made.add(push(1, rejection="one"), waiter(1))
    assert not made.is_ordinary
    assert verdict_of(made.pushes, "raise", 8) == ("refused", "one; three")
    assert verdict_of(made.pushes, "skip", 8) == ("skipped", "one; three")


SAYS = RoundSettings(statement="'w' (12ab)")
VOTE, TWO = RoundSettings(found_inf=True), RoundSettings(micro_steps=2)


def lacking(*tensors: int) -> RoundSettings:
    return RoundSettings(absent=frozenset(tensors))


RATE = RoundSettings(overrides=packed_overrides(0.1, (0.5, 0.9), None))
NEXT_RATE = RoundSettings(
    overrides=packed_overrides({"b": math.nextafter(0.1, 1), None: 0.1}, (0.5, 0.9), ["a", "b"])
)


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize(
    ("pushes", "verdict"),
    [
        ([push(0), push(1, settings=RoundSettings())], None),
        ([push(0, settings=TWO), push(1, settings=TWO)], None),
        ([push(0, settings=RATE), push(1, settings=replace(RATE))], None),
        (
            [push(0, settings=NEXT_RATE), push(1, settings=RATE), push(2, rejection="NaN")],
            (
                "disagreed",
                (
                    "overrides must be equal on all ranks: "
                    "rank 0 has lr=0.1, beta_1=0.5, beta_2=0.9; group 1: lr=0.10000000000000002, "
                    "rank 1 has lr=0.1, beta_1=0.5, beta_2=0.9, rank 2 has none"
                ),
            ),
        ),
        (
            [push(0, settings=TWO), push(1), push(2, settings=TWO)],
            (
                "disagreed",
                "micro_steps must be equal on all ranks: rank 0 has 2, rank 1 has 1, rank 2 has 2",
            ),
        ),
        (
            [push(0, rejection="NaN"), push(1, settings=TWO)],
            ("disagreed", "micro_steps must be equal on all ranks: rank 0 has 1, rank 1 has 2"),
        ),
        (
            [
                push(0, rejection="NaN"),
                push(1, rejection="one", settings=VOTE),
                push(2, settings=TWO),
                push(3, rejection="three", settings=VOTE),
            ],
            ("voted", "one; three"),
        ),
        ([push(1, settings=VOTE), push(0)], ("voted", "rank 1: found_inf")),
        ([push(0, settings=lacking(*range(8))), push(1, settings=lacking(*range(7)))], None),
        (
            [push(0, settings=lacking(*range(8))), push(1, settings=lacking(*range(8)))],
            ("empty", "no rank has a gradient"),
        ),
        (
            [push(0, settings=lacking(*range(8))), push(1, settings=VOTE)],
            ("voted", "rank 1: found_inf"),
        ),
        (
            [push(0, rejection="zero", settings=SAYS), push(1, rejection="one", settings=SAYS)],
            ("voted", "all ranks have changed 'w' (12ab)"),
        ),
        (
            [push(0, settings=VOTE), push(1, rejection="one", settings=SAYS), push(2)],
            (
                "disagreed",
                (
                    "all ranks must change the same between two steps: rank 0 changed nothing, "
                    "rank 1 changed 'w' (12ab), rank 2 changed nothing"
                ),
            ),
        ),
    ],
)
def test_a_vote_is_above_ranks_that_disagree_and_that_above_a_gradient_that_is_not_finite(
    pushes: list[Push], verdict: Any, on_nonfinite: Any
) -> None:
    """Whatever the order in which they come, to the letter."""
    for order in itertools.permutations(pushes):
        made = Round(0)
        for each in order:
            made.add(each, waiter(each.rank))
        assert verdict_of(made.pushes, on_nonfinite, 8) == verdict
        assert verdict is None or not made.is_ordinary


def test_a_round_steps_what_some_rank_has_a_gradient_of() -> None:
    made = round_of(0)
    made.add(push(1, settings=lacking(1, 2)), waiter(1))
    made.take_settings()
    assert made.absent == frozenset()
    made.superseded[0] = made.pushes.pop(0)
    made.add(push(0, settings=lacking(2, 3)), waiter(0))
    made.take_settings()
    assert made.absent == {2}


def test_the_settings_of_a_dead_workers_push_go_with_what_completes_it() -> None:
    vote = push(0, rejection="zero", settings=VOTE)
    assert vote.note.settings is VOTE
    made = round_of(1)
    made.complete(vote, {0: 2})
    assert not made.is_ordinary
    assert verdict_of(made.pushes, "raise", 8) == ("voted", "zero")


@pytest.mark.parametrize(
    ("sum_group", "ranks", "sizes"),
    [
        (1, (0, 1, 3), (3,)),
        (2, (0, 1, 2, 3, 4), (2, 2, 1)),
        (2, (1, 2, 4), (1, 1, 1)),
        (2, (0, 1, 4, 5), (2, 2)),
        (3, (1, 2, 3), (2, 1)),
        (9, (0, 8), (2,)),
    ],
)
def test_absent_ranks_are_left_out_of_their_groups_and_empty_groups_out_of_the_sum(
    sum_group: int, ranks: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    made = round_of(*reversed(ranks))
    assert made.summands(sum_group)[1] == Grouping(sizes, len(ranks))
    assert values_of(made, sum_group) == list(ranks)


def test_a_newer_workers_push_replaces_an_older_ones_whose_callers_are_refused() -> None:
    made = round_of(0, 1)
    assert errors(made.add(push(0, 2), waiter(0, 2))) == {"0.1": SupersededWorker}
    assert made.pushes[0].incarnation == 2
    assert [w.caller for w in made.waiting] == ["1.1", "0.2"]


def test_a_repeated_push_adds_only_its_caller() -> None:
    made = round_of(0)
    first = made.pushes[0]
    assert made.add(push(0), Waiter("again", 0, 1)) == []
    assert made.pushes[0] is first and [w.caller for w in made.waiting] == ["0.1", "again"]


def test_a_superseded_push_counts_again_only_if_it_is_completed() -> None:
    made = round_of(0, 1)
    made.supersede(0, 2)
    assert made.pushes.keys() == {1} and made.committed(0) is None
    assert made.complete(push(0), {}) == []
    assert made.pushes.keys() == {0, 1} and made.committed(0) == push(0).note
    made.supersede(0, 3)
    made.add(push(0, 3), waiter(0, 3))
    assert made.pushes[0].incarnation == 1, "a completed push counts whoever joins"


def test_a_completed_push_that_is_not_here_needs_its_gradients() -> None:
    made = Round(0)
    note = Push(epoch=0, rank=0, incarnation=1, round=1, gradients=None)
    with pytest.raises(IllegalMessage, match="the gradients of worker 1 for round 1 are not"):
        made.complete(note, {})
    assert made == Round(0)
    made.complete(push(0), {})
    assert made.pushes.keys() == {0}


def test_a_closed_round_keeps_its_pushes_and_answers_with_norms() -> None:
    made = round_of(0, 1)
    made.is_closed = True
    made.supersede(0, 2)
    made.keep_members((1,), 1)
    assert made.pushes.keys() == {0, 1} and made.committed(0) == push(0).note
    assert made.add(push(0, 2), waiter(0, 2)) == []
    assert [a.caller for a in made.measured(NORMS)] == ["0.1", "1.1", "0.2"]  # type: ignore[union-attr]
    assert made.add(push(0, 2), Waiter("late", 0, 2)) == [Answer("late", NORMS)]
    assert made.pushes[0].incarnation == 1


def test_norms_are_taken_only_once_they_are_measured_and_from_a_rank_that_pushed() -> None:
    made = round_of(0)
    for _ in range(2):
        with pytest.raises(IllegalMessage, match="norms came, but its round awaits none"):
            made.add_norms(np.ones(1), waiter(1))
        made.measured(NORMS)
    made.add_norms(np.ones(1), waiter(0))
    assert made.square_sums is not None and [w.caller for w in made.waiting] == ["0.1"]


def test_a_norm_that_overflows_names_its_tensor() -> None:
    layout = Layout.of({"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)})
    made = Round(0, square_sums=np.array([1.0, np.inf]))
    assert made.overflow(layout) == "the norm of the mean gradient of 'b' overflows"
    made.square_sums = np.ones(2)
    assert made.overflow(layout) is None


def test_it_is_orphaned_when_every_worker_that_pushed_was_replaced() -> None:
    made = round_of(0, 1)
    newest = [{0: 1, 1: 1}, {0: 2, 1: 1}, {0: 2, 1: 2}]
    assert [made.is_orphaned(known) for known in newest] == [False, False, True]


def test_a_caller_whose_rank_counted_with_another_push_is_late() -> None:
    made = round_of(0)
    late = [made.late_push(waiter(0, 2), 1), made.late_push(waiter(1), 1)]
    assert all(isinstance(error, LatePush) for error in late)
    assert "round 1 was completed with the push of worker 1" in str(late[0])
    assert "round 1 was completed without this rank" in str(late[1])


def test_pushes_of_ranks_that_are_no_longer_members_are_forgotten() -> None:
    made = round_of(0, 1, 2)
    made.keep_members((0, 2), 1)
    assert made.pushes.keys() == {0, 2}
