"""Law 3: the result does not depend on the order in which pushes arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from tests.models import bits, params, run

STEPS = 3
orders = st.lists(st.permutations(range(3)), min_size=STEPS, max_size=STEPS)


def built(backend: str, num_shards: int, sum_group: int = 1) -> DistNadam:
    return DistNadam(
        num_shards=num_shards,
        num_workers=3,
        sum_group=sum_group,
        backend=backend,
        global_clipnorm=0.9,
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
