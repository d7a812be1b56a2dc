"""The gradient buffer: what it copies, in which precision, and what it refuses."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.gradient_runs import BLOCK
from distnadam.errors import ConfigError, LifecycleError, StructureError
from distnadam.tensors.arrays import dtype_of, empty_flat
from distnadam.tensors.layout import Layout

MODEL = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float64)}
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def make(model: Any = MODEL, **how: bool) -> GradientBuffer:
    layout = Layout.of(model)
    return GradientBuffer(layout, "worker 7", empty_flat(layout.sizes), **how)


def tree(value: float = 1.0) -> dict[str, Any]:
    return {"a": np.full((2, 3), value, np.float32), "b": np.full(4, value)}


def test_a_tree_is_copied_into_its_spaces_so_that_the_callers_arrays_may_be_reused() -> None:
    buffer, given = make(), tree(2.0)
    assert buffer.fill(given) is None
    given["a"][:] = 9.0
    assert {space: flat.tolist() for space, flat in buffer.flat.items()} == {
        "float32": [2.0] * 6,
        "float64": [2.0] * 4,
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20], ids=str)
def test_what_is_not_finite_or_overflows_when_squared_is_named_with_its_place(bad: float) -> None:
    buffer, given = make(), tree()
    given["a"][1, 2] = bad
    rejection = buffer.fill(given)
    assert rejection is not None
    assert rejection.startswith("worker 7: gradient 'a' is not finite, or its square overflows")
    assert "at index (1, 2)" in rejection
    assert buffer.fill(tree()) is None, "the next round is free of it"


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bad_element_is_found_in_any_block(compiled: bool, at: int) -> None:
    buffer = make({"w": np.zeros(2 * BLOCK + 6, np.float32)}, compiled=compiled)
    given = np.ones(2 * BLOCK + 6, np.float32)
    given[at] = np.nan
    assert f"at index ({at},)" in str(buffer.fill({"w": given}))


def test_the_square_of_a_float64_may_be_larger_than_one_of_a_float32() -> None:
    given = tree()
    given["b"][0] = 1e20
    assert make().fill(given) is None


def test_nothing_is_checked_if_that_is_not_wanted() -> None:
    assert make(check=False).fill(tree(float("nan"))) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_that_all_come_in_one_half_precision_stay_in_it(dtype: Any) -> None:
    buffer = make({"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)})
    assert buffer.fill({"a": np.ones(3, dtype), "b": np.ones(2, dtype)}) is None
    assert buffer.flat["float32"].dtype == dtype
    buffer.fill({"a": np.ones(3, dtype), "b": np.ones(2, np.float32)})
    assert buffer.flat["float32"].dtype == np.float32, "mixed ones are widened"


def test_a_half_that_is_not_finite_is_refused_and_its_square_is_taken_widened() -> None:
    buffer = make({"w": np.zeros(2, np.float32)})
    assert buffer.fill({"w": np.array([60000, 1], np.float16)}) is None
    assert buffer.fill({"w": np.array([np.inf, 1], np.float16)}) is not None


def test_the_parts_are_views_of_each_shards_ranges() -> None:
    layout = Layout.of(MODEL)
    buffer = make()
    buffer.fill({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4.0)})
    cuts = layout.cuts(3)
    parts = buffer.parts(cuts)
    for space, flat in buffer.flat.items():
        assert np.array_equal(np.concatenate([part[space] for part in parts]), flat)
        assert all(np.shares_memory(part[space], flat) for part in parts if part[space].size)
    assert buffer.parts(cuts) is parts, "the same cut is made once"


def test_tensors_written_one_by_one_must_all_come_and_each_once() -> None:
    buffer = make()
    buffer.write("a", tree()["a"])
    with pytest.raises(StructureError, match="'a' was pushed already for this round"):
        buffer.write("a", tree()["a"])
    with pytest.raises(StructureError, match="'c' is not a tensor of the model"):
        buffer.write("c", tree()["a"])
    with pytest.raises(StructureError, match=r"'b' was not pushed for this round \(1 missing\)"):
        buffer.finish()
    buffer.write("b", tree()["b"])
    assert buffer.finish() is None


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_written_into_the_views_is_checked_when_it_is_finished(compiled: bool) -> None:
    buffer = make(compiled=compiled)
    with pytest.raises(LifecycleError, match="give gradients, or write them into the views"):
        buffer.finish()
    views = buffer.views(None)
    views["a"][:], views["b"][:] = 1.0, 2.0
    assert buffer.finish() is None
    assert np.shares_memory(views["a"], buffer.flat["float32"])
    views["b"][3] = np.nan
    assert "gradient 'b'" in str(buffer.finish())


def test_views_come_in_half_precision_where_that_is_asked_for() -> None:
    buffer = make()
    views = buffer.views("bfloat16")
    assert (views["a"].dtype, views["b"].dtype) == (HALVES[1], np.float64)
    with pytest.raises(ConfigError, match="got 'int8'"):
        buffer.views("int8")


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_views_in_half_precision_are_refused_over_tensors_that_were_pushed(half: str) -> None:
    buffer = make()
    buffer.write("a", tree()["a"])
    with pytest.raises(LifecycleError, match=f"worker 7: tensors .* ask for views in {half}"):
        buffer.views(half)
    buffer.write("b", tree()["b"])
    assert buffer.finish() is None
    assert buffer.flat["float32"].tolist() == [1.0] * 6


def _shape(size: int, dims: int) -> tuple[int, ...]:
    if dims == 0:
        return ()
    return (size,) if dims == 1 else (size // 3 + 1, 3)


@given_by(
    tensors=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 5, 1000, BLOCK - 1, BLOCK, BLOCK + 1]),
            st.sampled_from([0, 1, 2]),
            st.sampled_from(["float32", "float64"]),
            st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_tensor_lies_where_the_layout_says_however_they_are_copied_together(
    tensors: list[tuple[int, int, str, str, bool]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [_shape(size, dims) for size, dims, *_ in tensors]
    model = {f"{i:02d}": np.zeros(shape, tensors[i][2]) for i, shape in enumerate(shapes)}
    buffer, layout = make(model), Layout.of(model)
    given = {}
    for (path, zeros), (_, _, _, dtype, is_fortran) in zip(model.items(), tensors, strict=True):
        values = np.asarray(rng.standard_normal(zeros.shape)).astype(dtype_of(dtype))
        given[path] = np.array(values, order="F" if is_fortran else "C")
    assert buffer.fill(given) is None
    for tensor in layout.tensors:
        found = buffer.flat[tensor.space][tensor.begin : tensor.end]
        expected = given[tensor.path].astype(found.dtype).reshape(-1)
        assert found.tobytes() == expected.tobytes(), tensor


def test_a_bad_element_of_tensors_that_are_copied_together_is_named() -> None:
    model = {f"{i:03d}": np.zeros(7, np.float32) for i in range(200)}
    given = {path: np.ones(7, np.float32) for path in model}
    given["123"][4] = np.inf
    assert "gradient '123' is not finite" in str(make(model).fill(given))
    assert "at index (4,)" in str(make(model).fill(given))


def test_views_of_the_memory_may_be_given_back_in_another_order() -> None:
    buffer = make({"a": np.zeros((3, 3), np.float32), "b": np.zeros(4, np.float32)})
    views = buffer.views(None)
    views["a"][:] = np.arange(9).reshape(3, 3)
    views["b"][:] = np.arange(4)
    expected = [*np.arange(9).reshape(3, 3).T.reshape(-1), *np.arange(4)[::-1]]
    assert buffer.fill({"a": views["a"].T, "b": views["b"][::-1]}) is None
    assert buffer.flat["float32"].tolist() == expected


@pytest.mark.parametrize("size", [3, BLOCK + 1])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_views_in_the_places_of_other_tensors_are_taken_as_they_were(
    size: int, dtype: str | None, compiled: bool
) -> None:
    model = {name: np.zeros(size, np.float32) for name in "abc"}
    buffer = make(model, compiled=compiled)
    views = buffer.views(dtype)

    def filled(**tree: Any) -> dict[str, float]:
        for name, value in zip("abc", (1, 2, 3), strict=True):
            views[name][:] = value
        assert buffer.fill(tree) is None
        parts = buffer.flat["float32"].astype(np.float32).reshape(3, size)
        assert (parts == parts[:, :1]).all()
        return dict(zip("abc", parts[:, 0].tolist(), strict=True))

    own = np.full(size, 7, np.float32)
    assert filled(**views) == {"a": 1, "b": 2, "c": 3}
    assert filled(a=views["b"], b=views["c"], c=views["a"]) == {"a": 2, "b": 3, "c": 1}
    assert filled(a=own, b=views["a"], c=views["a"][::-1]) == {"a": 7, "b": 1, "c": 1}
    assert filled(a=views["a"], b=views["b"], c=own) == {"a": 1, "b": 2, "c": 7}


@pytest.mark.parametrize("first", [(0,), (2,)])
def test_a_tensor_without_elements_may_come_in_another_half_precision(first: tuple[int]) -> None:
    model = {"a": np.zeros(first, np.float32), "b": np.zeros(2 - first[0], np.float32)}
    buffer = GradientBuffer(layout := Layout.of(model), "worker 7", empty_flat(layout.sizes))
    halves = [np.float16, ml_dtypes.bfloat16] if first[0] else [ml_dtypes.bfloat16, np.float16]
    tree = {k: np.ones_like(v, half) for (k, v), half in zip(model.items(), halves, strict=True)}
    assert buffer.fill(tree) is None
    assert buffer.flat["float32"].dtype == np.float16
    assert buffer.flat["float32"].tolist() == [1, 1]
