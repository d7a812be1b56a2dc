"""A rank's vote that its loss-scaled gradients overflowed: one skips the round, on all ranks."""

from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import LifecycleError, NonFiniteGradient, StepTimeout
from tests.models import bits, gradients, params

NAN = {"w": np.full(3, np.nan, np.float32)}
ONES = {"w": np.ones(3, np.float32)}


def small(**given: Any) -> DistNadam:
    return DistNadam(backend="local", **given).build({"w": np.ones(3, np.float32)})


@pytest.mark.on_ray(slow=["ray-objects-raise"])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("transport", ["auto", "objects"])
def test_a_vote_skips_the_round_on_all_ranks_and_each_can_ask_why(
    backend: str, transport: Any, on_nonfinite: Any
) -> None:
    options = Options(on_nonfinite=on_nonfinite, transport=transport)
    with DistNadam(
        num_shards=2, num_workers=3, sum_group=2, backend=backend, options=options
    ).build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(3)]
        for worker, ticket in [(w, w.push(gradients(0, w.rank))) for w in workers]:
            assert (ticket.result(), ticket.found_inf, worker.found_inf) == (1, False, False)
        before = bits(optimizer)
        not_finite = gradients(1, 0)
        not_finite["dense"]["bias"][0] = np.nan
        tickets = [
            workers[0].push(not_finite),
            workers[1].push(found_inf=True),
            workers[2].push(gradients(1, 2), found_inf=True),
        ]
        for worker, ticket in zip(workers, tickets, strict=True):
            assert not ticket.found_inf
            assert (ticket.result(), ticket.found_inf, worker.found_inf) == (1, True, True)
        assert (optimizer.round, optimizer.iterations, optimizer.skipped) == (2, 1, 1)
        assert bits(optimizer) == before
        for worker, ticket in [(w, w.push(gradients(1, w.rank))) for w in workers]:
            assert (ticket.result(), ticket.found_inf, worker.found_inf) == (2, False, False)
        got = bits(optimizer)
    with DistNadam(num_workers=3, sum_group=2, backend="local").build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(3)]
        for step in range(2):
            for ticket in [w.push(gradients(step, w.rank)) for w in workers]:
                ticket.result()
        assert bits(optimizer) == got


def test_a_step_that_is_voted_down_returns_the_parameters_as_they_were() -> None:
    with small(clipnorm=1.0) as optimizer, optimizer.worker(0) as worker:
        stepped = worker.step(ONES)["w"].copy()
        assert worker.step(found_inf=True)["w"].tolist() == stepped.tolist()
        assert worker.found_inf
        assert worker.step(NAN, found_inf=np.float32(1.0))["w"].tolist() == stepped.tolist()
        assert worker.step(ONES, found_inf=np.False_)["w"].tolist() != stepped.tolist()
        assert not worker.found_inf
        assert (optimizer.iterations, optimizer.skipped) == (2, 2)


def test_a_round_that_a_gradient_skips_is_no_vote() -> None:
    with small(options=Options(on_nonfinite="skip")) as optimizer, optimizer.worker(0) as worker:
        ticket = worker.push(NAN)
        assert (ticket.result(), ticket.found_inf, worker.found_inf) == (0, False, False)
        assert optimizer.skipped == 1


def test_a_vote_drops_what_came_for_the_round_otherwise() -> None:
    with small() as optimizer, optimizer.worker(0) as worker:
        worker.push_tensor("w", NAN["w"])
        worker.step(found_inf=True)
        worker.accumulate(NAN)
        worker.step(found_inf=True)
        with pytest.raises(LifecycleError, match="give gradients"):
            worker.push()
        worker.accumulate(ONES)
        assert worker.push().result() == 1
        assert optimizer.skipped == 2


@pytest.mark.on_ray
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("clip", [{}, {"global_clipnorm": 1.0}])
def test_a_step_from_outside_takes_a_vote(
    num_shards: int, clip: dict[str, float], backend: str
) -> None:
    with DistNadam(num_shards=num_shards, backend=backend, **clip).build(params()) as optimizer:
        optimizer.apply_gradients(gradients(0, 0))
        before = bits(optimizer)
        assert optimizer.apply_gradients(None, found_inf=True) == 1
        assert optimizer.apply_gradients(gradients(5, 0), found_inf=True) == 1
        assert bits(optimizer) == before
        assert (optimizer.round, optimizer.skipped) == (3, 2)
        optimizer.apply_gradients(gradients(1, 0))
        got = bits(optimizer)
    with DistNadam(backend="local", **clip).build(params()) as optimizer:
        for step in range(2):
            optimizer.apply_gradients(gradients(step, 0))
        assert bits(optimizer) == got


@pytest.mark.parametrize("voted", [True, False])
def test_a_push_seen_to_its_end_after_later_rounds_does_not_tell_of_theirs(voted: bool) -> None:
    ones = {"w": np.ones(3, np.float32)}
    with DistNadam(backend="local", num_workers=2, num_shards=2).build(ones) as optimizer:
        one, other = (optimizer.worker(rank) for rank in range(2))
        ticket = one.push(ones, found_inf=voted)
        with pytest.raises(StepTimeout):
            ticket.result(0.0)
        other.push(ones).result()
        assert other.found_inf == voted
        if voted:
            optimizer.apply_gradients(ones)
        else:
            optimizer.apply_gradients(None, found_inf=True)
        ticket.result()
        assert ticket.found_inf == voted


def test_a_push_whose_round_was_applied_is_not_refused_with_a_later_one() -> None:
    ones = {"w": np.ones(3, np.float32)}
    with DistNadam(backend="local", num_workers=2, num_shards=2).build(ones) as optimizer:
        one, other = (optimizer.worker(rank) for rank in range(2))
        ticket = one.push(ones)
        with pytest.raises(StepTimeout):
            ticket.result(0.0)
        other.push(ones).result()
        with pytest.raises(NonFiniteGradient):
            optimizer.apply_gradients({"w": np.full(3, np.nan, np.float32)})
        assert ticket.result() == 1
