"""Law 3: the result does not depend on the order in which pushes arrive."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.errors import NonFiniteGradient, RanksDisagree
from tests.models import bits, gradients, params, run

STEPS = 3
orders = st.lists(st.permutations(range(3)), min_size=STEPS, max_size=STEPS)


def built(backend: str, num_shards: int, sum_group: int = 1) -> DistNadam:
    return DistNadam(
        num_shards=num_shards,
        num_workers=3,
        sum_group=sum_group,
        backend=backend,
        global_clipnorm=0.9,
        clocks="tensor",
    ).build(params())


def run_in(
    orders: list[list[int]], backend: str, num_shards: int, sum_group: int = 1
) -> list[bytes]:
    with built(backend, num_shards, sum_group) as optimizer:
        run(optimizer, 0, STEPS, order=lambda step: orders[step], num_workers=3)
        return bits(optimizer)


@given(orders=orders, sum_group=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_order_of_local_pushes_gives_the_same_bits(
    orders: list[list[int]], sum_group: int
) -> None:
    in_order = [[0, 1, 2]] * STEPS
    assert run_in(orders, "local", 2, sum_group) == run_in(in_order, "local", 2, sum_group)


def seen_in(orders: list[list[int]], says: list[list[str]], *, sum_group: int) -> list[Any]:
    """What each rank is told of each round, and the bits at the end."""
    told: list[Any] = []
    with built("local", 2, sum_group) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(3)]
        for step, (order, given) in enumerate(zip(orders, says, strict=True)):
            tickets = {}
            for rank in order:
                tree = gradients(step, rank)
                if given[rank] == "NaN":
                    tree["dense"]["bias"][0] = np.nan
                if given[rank] == "vote":
                    tickets[rank] = workers[rank].push(found_inf=True)
                    continue
                for _ in range(2 if given[rank] == "two" else 1):
                    workers[rank].accumulate(tree)
                tickets[rank] = workers[rank].push()
            for rank, ticket in sorted(tickets.items()):
                try:
                    told.append((ticket.result(), ticket.found_inf, workers[rank].found_inf))
                except (NonFiniteGradient, RanksDisagree) as error:
                    told.append((type(error), str(error)))
        return [*told, optimizer.iterations, optimizer.skipped, bits(optimizer)]


@given(
    orders=orders,
    says=st.lists(
        st.lists(
            st.sampled_from(["one", "one", "one", "two", "vote", "NaN"]), min_size=3, max_size=3
        ),
        min_size=STEPS,
        max_size=STEPS,
    ),
    sum_group=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_order_of_votes_counts_and_gradients_ends_alike_to_the_letter(
    orders: list[list[int]], says: list[list[str]], sum_group: int
) -> None:
    in_order = seen_in([[0, 1, 2]] * STEPS, says, sum_group=sum_group)
    assert seen_in(orders, says, sum_group=sum_group) == in_order
    for step, each in enumerate(says):
        of_round = in_order[3 * step : 3 * step + 3]
        assert all(one == of_round[0] for one in of_round), "all ranks are told the same"
        assert (of_round[0][-1] is True) == ("vote" in each)


@pytest.mark.usefixtures("ray_cluster")
def test_every_order_of_pushes_over_ray_gives_the_local_bits() -> None:
    right = run_in([[0, 1, 2]] * STEPS, "local", 1)
    with built("ray", 2) as optimizer:
        first, weights = optimizer.get_params(), optimizer.get_weights()

        @given(orders=orders)
        @settings(max_examples=5)
        def check(orders: list[list[int]]) -> None:
            optimizer.set_params(first)
            optimizer.set_weights(weights)
            run(optimizer, 0, STEPS, order=lambda step: orders[step], num_workers=3)
            assert bits(optimizer) == right

        check()
