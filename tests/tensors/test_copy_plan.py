"""The copy plan: each element of the new range once, from the shard that held it, whatever the old
and new cuts.
"""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.errors import StructureError
from distnadam.tensors.copy_plan import Copy, copy_plan


def cut(size: int, points: list[int]) -> list[tuple[int, int]]:
    bounds = [0, *sorted(min(p, size) for p in points), size]
    return list(pairwise(bounds))


@given(
    size=st.integers(0, 50),
    old=st.lists(st.integers(0, 50), max_size=6),
    new=st.lists(st.integers(0, 50), max_size=6),
)
def test_every_element_comes_once_from_the_shard_that_held_it(
    size: int, old: list[int], new: list[int]
) -> None:
    olds = cut(size, old)
    for begin, end in cut(size, new):
        plan = copy_plan([{"float32": r} for r in olds], {"float32": (begin, end)})
        elements = [(e, c.source) for c in plan for e in range(c.begin, c.end)]
        assert [e for e, _ in elements] == list(range(begin, end))
        assert all(olds[source][0] <= e < olds[source][1] for e, source in elements)


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ([(0, 4), (5, 9)], "element 4 is held by none"),
        ([(0, 5), (4, 9)], "element 4 is held twice"),
        ([(0, 8)], "element 8 is held by none"),
    ],
)
def test_a_gap_or_an_overlap_is_refused(old: list[tuple[int, int]], told: str) -> None:
    with pytest.raises(StructureError, match=told):
        copy_plan([{"float32": r} for r in old], {"float32": (0, 9)})


def test_spaces_are_planned_apart() -> None:
    old = [{"float32": (0, 2), "float64": (0, 0)}, {"float32": (2, 3), "float64": (0, 1)}]
    assert copy_plan(old, {"float32": (1, 3), "float64": (0, 1)}) == [
        Copy(0, "float32", 1, 2),
        Copy(1, "float32", 2, 3),
        Copy(1, "float64", 0, 1),
    ]
