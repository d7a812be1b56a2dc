"""Trees of very many small tensors, which are taken apart, checked and copied in other ways than
small trees are: with the same result.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from distnadam.errors import StructureError
from distnadam.tensors.layout import Layout
from distnadam.tensors.pieces import concatenate

COUNT = 1500


def leaves(dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(3,), (), (2, 2), (0,), (1, 5)]
    return [rng.standard_normal(shapes[i % 5]).astype(dtype) for i in range(COUNT)]


def of(arrays: list[np.ndarray]) -> dict[str, Any]:
    return {f"{i:04d}": array for i, array in enumerate(arrays)}


OTHERS: dict[str, np.ndarray] = {
    "alike": np.ones(3, np.float32),
    "not contiguous": np.arange(6, dtype=np.float32)[::2],
    "in Fortran's order": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "wider": np.ones(3, np.float64),
    "narrower": np.ones(3, np.float16),
    "bfloat16": np.ones(3, ml_dtypes.bfloat16),
    "of another byte order": np.ones(3, ">f4"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_many_arrays_are_copied_as_few_are(what: str, dtype: Any) -> None:
    arrays = [*leaves(dtype), OTHERS[what].astype(dtype) if dtype != np.float32 else OTHERS[what]]
    out = np.empty(sum(array.size for array in arrays), dtype)
    concatenate(arrays, out)
    expected = np.concatenate([array.astype(dtype).ravel() for array in arrays])
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("backwards", [False, True])
def test_many_leaves_come_in_the_models_order(backwards: bool) -> None:
    arrays = leaves()
    layout = Layout.of(of(arrays))
    tree = of(arrays)
    given = dict(reversed(tree.items())) if backwards else tree
    found = layout.leaves(given, what="these")
    assert all(x is y for x, y in zip(found, arrays, strict=True))


@pytest.mark.parametrize("index", [0, 511, 512, COUNT - 1])
@pytest.mark.parametrize("wrong", [np.ones(7, np.float32), np.ones(3, np.int64), None])
def test_one_wrong_leaf_of_many_is_named(index: int, wrong: Any) -> None:
    arrays = leaves()
    tree = of(arrays) | {f"{index:04d}": wrong}
    with pytest.raises(StructureError, match=f"'{index:04d}'"):
        Layout.of(of(arrays)).leaves(tree, what="these")


def test_one_missing_of_many_is_named() -> None:
    tree = of(leaves())
    layout = Layout.of(tree)
    with pytest.raises(StructureError, match="'0700' is missing"):
        layout.leaves({("x" if k == "0700" else k): v for k, v in tree.items()}, what="these")
