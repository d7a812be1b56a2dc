"""Cuts of unequal shares: all elements are covered once, and a larger share holds no less."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.errors import ConfigError
from distnadam.tensors.layout import CHUNK, Layout, sizes_of

SHARES = st.lists(st.integers(0, 2**40) | st.integers(0, 3), min_size=1, max_size=12).filter(any)
SIZES = st.lists(st.integers(0, 9 * CHUNK), min_size=1, max_size=5)


def layout_of(sizes: list[int], dtypes: tuple[Any, ...] = (np.float32, np.float64)) -> Layout:
    kinds = itertools.cycle(dtypes)
    return Layout.of([np.zeros(size, next(kinds)) for size in sizes])


@given(sizes=SIZES, shares=SHARES)
def test_cuts_of_any_shares_cover_every_element_once_near_their_shares(
    sizes: list[int], shares: list[int]
) -> None:
    layout = layout_of(sizes)
    cuts = layout.cuts(shares)
    assert len(cuts) == len(shares)
    for space, size in layout.sizes.items():
        held = [cut[space] for cut in cuts]
        assert (held[0][0], held[-1][1]) == (0, size)
        assert all(one[1] == next_one[0] for one, next_one in itertools.pairwise(held))
        for (begin, end), share in zip(held, shares, strict=True):
            assert abs((end - begin) - size * share / sum(shares)) <= CHUNK + 1


@given(size=st.integers(1, 99 * CHUNK), shares=SHARES, more=st.integers(1, 2**40), data=st.data())
def test_a_larger_share_never_holds_less(
    size: int, shares: list[int], more: int, data: Any
) -> None:
    layout, who = layout_of([size]), data.draw(st.integers(0, len(shares) - 1))
    before = sizes_of(layout.cuts(shares)[who])["float32"]
    shares[who] += more
    after = sizes_of(layout.cuts(shares)[who])["float32"]
    assert after >= before - CHUNK  # both of its ends are on the grid


@given(sizes=SIZES, count=st.integers(1, 9), times=st.integers(1, 2**40))
def test_equal_shares_are_the_cut_by_a_number(sizes: list[int], count: int, times: int) -> None:
    layout = layout_of(sizes)
    assert layout.cuts([times] * count) == layout.cuts(count)


def test_a_share_of_everything_leaves_the_others_empty() -> None:
    layout = layout_of([5 * CHUNK])
    held = [sizes_of(cut)["float32"] for cut in layout.cuts([0, 0, 2**60, 0])]
    assert held == [0, 0, 5 * CHUNK, 0]


@pytest.mark.parametrize("shares", [[1, 2], [1, 1, -1], [0, 0, 0], [1, 1, 0.5], [True, "1", 1], 3])
def test_shares_that_cannot_be_are_refused_and_nothing_is_moved(shares: Any) -> None:
    with DistNadam(num_shards=2, backend="local").build([np.ones(4, np.float32)]) as optimizer:
        with pytest.raises(ConfigError, match=r"^shares: expected 3 whole numbers"):
            optimizer.reshard(3, shares=shares)
        assert len(optimizer.shards.backend.transport.cuts) == 2
