"""Memory that is lent again only when nothing refers to it."""

import numpy as np

from distnadam.tensors.arrays import dtype_of
from distnadam.transport.landing_memory import LandingMemory

SIZES = {"float32": 1000, "float64": 10}
WIDE = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
HALF = WIDE | {"float32": dtype_of("bfloat16")}


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_what_nobody_has_any_more_is_lent_again() -> None:
    memory = LandingMemory(2)
    first = memory.lend(SIZES, WIDE)
    where = {space: address(array) for space, array in first.items()}
    del first
    again = memory.lend(SIZES, HALF)
    assert {space: address(array) for space, array in again.items()} == where
    assert {s: (a.size, a.dtype) for s, a in again.items()} == {
        s: (n, HALF[s]) for s, n in SIZES.items()
    }


def test_a_view_or_a_buffer_of_what_was_lent_keeps_it() -> None:
    memory = LandingMemory(8)
    for hold in (
        lambda lent: lent["float32"][5:6],
        lambda lent: lent["float32"].view("u1").data,
        lambda lent: memoryview(lent["float32"])[10:],
    ):
        lent = memory.lend(SIZES, WIDE)
        where = address(lent["float32"])
        held = hold(lent)
        del lent
        other = memory.lend(SIZES, WIDE)
        assert address(other["float32"]) != where
        del other, held


def test_no_more_is_kept_than_was_said_and_what_is_lent_stays_whole() -> None:
    memory = LandingMemory(2)
    lent = [memory.lend(SIZES, WIDE) for _ in range(5)]
    for number, flat in enumerate(lent):
        flat["float32"][:] = number
    assert [flat["float32"][0] for flat in lent] == [0, 1, 2, 3, 4]
    assert memory.num_bytes == 2 * (4 * 1000 + 8 * 10)
