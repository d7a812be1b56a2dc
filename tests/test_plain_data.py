"""Plain data: what is kept comes back equal and of its type, through msgpack and JSON."""

import datetime as dt
import enum
import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distnadam.errors import ConfigError
from distnadam.plain_data import MOST_LEVELS, PlainData

PLAIN = PlainData()
DTYPES = hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes()
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
LEAVES = (
    KEYS
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.sampled_from(["\udcff", "$tuple", "class_name", "config"])
    | st.binary()
    | ARRAYS
    | ARRAYS.filter(lambda array: array.size).map(lambda array: array.flat[0])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS | st.sampled_from(["$int", "$dict"]), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, of the same types, to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (np.ndarray, np.generic)):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


@pytest.mark.parametrize("bare", [list, tuple])
@given(value=VALUES)
def test_a_value_comes_back_through_msgpack_and_json(bare: type, value: Any) -> None:
    plain = PlainData(bare=bare)
    packed = plain.pack(value, "value")
    through_msgpack = msgpack.unpackb(msgpack.packb(packed), strict_map_key=False)
    through_json = json.loads(json.dumps(packed, allow_nan=False))
    assert same(plain.unpack(through_msgpack), value)
    assert same(plain.unpack(through_json), value)


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_a_generator_goes_on_from_its_state(kind: str) -> None:
    generator = np.random.Generator(getattr(np.random, kind)(7))
    packed = PLAIN.pack(generator.bit_generator.state, "state")
    drawn = generator.random(5)
    generator.bit_generator.state = PLAIN.unpack(packed)
    assert np.array_equal(generator.random(5), drawn)


def test_the_states_of_older_generators_go_on_too() -> None:
    packed = PLAIN.pack((random.getstate(), np.random.RandomState(3).get_state()), "states")
    of_python, of_numpy = PLAIN.unpack(packed)
    assert of_python == random.getstate()
    legacy = np.random.RandomState(0)
    legacy.set_state(of_numpy)
    assert legacy.randint(1000) == np.random.RandomState(3).randint(1000)


class Colour(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    first: int
    second: tuple[int, ...]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, 1),
        (Pair(1, (2,)), (1, (2,))),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (np.float32(0.1), np.float32(0.1)),
        (ml_dtypes.bfloat16(1.5), ml_dtypes.bfloat16(1.5)),
        (np.arange(4, dtype=">i4")[::2], np.array([0, 2], ">i4")),
        (np.empty(0, "U0"), np.empty(0, "U0")),
        (10**5000, 10**5000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_odd_values_come_back_as_what_they_equal(value: Any, expected: Any) -> None:
    assert same(PLAIN.unpack(PLAIN.pack(value, "value")), expected)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        frozenset(),
        Path("x"),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        1j,
        bytearray(b"x"),
        object(),
        print,
        np.random.default_rng(),
        np.array([None]),
        np.zeros(2, [("a", int)]),
        np.ma.masked_array([1.0], [True]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\['run'\]\[1\]\['it'\]: expected .*, got "):
        PLAIN.pack({"run": [0, {"it": value}]}, "data")


def test_a_key_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data: key frozenset.*: expected None, bool"):
        PLAIN.pack({frozenset(): 1}, "data")


def test_what_holds_itself_or_is_too_deep_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    nested: Any = ()
    for _ in range(MOST_LEVELS):
        nested = (nested,)
    assert PLAIN.unpack(PLAIN.pack(nested, "data")) == nested
    for value in (endless, [nested]):
        with pytest.raises(ConfigError, match=rf"deeper than {MOST_LEVELS} levels, or holds its"):
            PLAIN.pack(value, "data")


def test_plain_data_shares_nothing_with_the_value() -> None:
    value = {"seen": [1, 2], "array": np.zeros(2), "place": {"epoch": 0}}
    packed = PLAIN.pack(value, "data")
    value["seen"].append(3)  # type: ignore[attr-defined]
    value["array"] += 1.0  # type: ignore[operator]
    value["place"]["epoch"] = 9  # type: ignore[index]
    kept = PLAIN.unpack(packed)
    assert same(kept, {"seen": [1, 2], "array": np.zeros(2), "place": {"epoch": 0}})


@pytest.mark.parametrize(
    "packed",
    [
        {"$array": ["O", [1], "AAAAAAAAAAA="]},
        {"$array": ["<f4", [1 << 60], "AAAA"]},
        {"$array": ["<f4", [-1, -1], "AAAAAA=="]},
        {"$array": ["<f4", [1], "not base64"]},
        {"$scalar": ["<f4"]},
        {"$int": "0x"},
        {"$int": 3},
        {"$tuple": 3},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$unknown": 1},
        {"$str": "//8="},
    ],
    ids=str,
)
def test_what_pack_never_returns_is_refused(packed: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        PLAIN.unpack(packed)
