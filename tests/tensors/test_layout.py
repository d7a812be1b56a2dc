"""Layout: every element lies once, cuts cover and fall on the chunk grid, trees come back as they
were, and nonsense is refused.
"""

import itertools
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam.errors import StructureError
from distnadam.tensors.arrays import BFLOAT16
from distnadam.tensors.layout import CHUNK, Layout

SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3000)),
    st.tuples(st.integers(0, 60), st.integers(0, 60)),
    st.just((CHUNK,)),
    st.just((2, CHUNK)),
)
ARRAYS = st.builds(
    lambda shape, dtype: np.ones(shape, dtype),
    SHAPES,
    st.sampled_from(["float16", "float32", "float64"]),
)
TREES = st.recursive(
    ARRAYS,
    lambda children: st.one_of(
        st.lists(children, min_size=1, max_size=4),
        st.lists(children, min_size=1, max_size=3).map(tuple),
        st.dictionaries(
            st.text("abcxyz", min_size=1, max_size=3), children, min_size=1, max_size=4
        ),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(tree=TREES, num_shards=st.integers(1, 20))
def test_cuts_cover_every_element_once_in_order_on_the_chunk_grid(
    tree: Any, num_shards: int
) -> None:
    layout = Layout.of(tree)
    cuts = layout.cuts(num_shards)
    for space, size in layout.sizes.items():
        ends = [cut[space] for cut in cuts]
        assert ends[0][0] == 0
        assert ends[-1][1] == size
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
        for begin, _ in ends:
            assert begin == size or any(
                t.space == space and t.begin <= begin < t.end and (begin - t.begin) % CHUNK == 0
                for t in layout.tensors
            )
        assert all(abs((end - begin) - size / num_shards) <= 2 * CHUNK for begin, end in ends), (
            "nearly equal"
        )


@settings(deadline=None)
@given(tree=TREES, num_shards=st.integers(1, 20))
def test_the_segments_of_all_cuts_are_every_tensor_once(tree: Any, num_shards: int) -> None:
    layout = Layout.of(tree)
    found: dict[int, int] = {}
    for cut in layout.cuts(num_shards):
        for space, (begin, end) in cut.items():
            for segment in layout.segments(space, begin, end):
                tensor = layout.tensors[segment.tensor]
                assert segment.begin == tensor.begin + found.get(segment.tensor, 0)
                found[segment.tensor] = segment.end - tensor.begin
    assert found == {i: t.end - t.begin for i, t in enumerate(layout.tensors) if t.end > t.begin}


@settings(deadline=None)
@given(tree=TREES, seed=st.integers(0, 1000))
def test_a_tree_comes_back_as_it_was_and_a_layout_survives_plain_data(tree: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = Layout.of(tree)
    values = [rng.standard_normal(t.shape).astype(t.dtype) for t in layout.tensors]
    given_tree = layout.unflatten(values)
    got = layout.tree(layout.flat(given_tree, what="params"))
    for leaf, value in zip(layout.leaves(got, what="params"), values, strict=True):
        assert leaf.dtype == value.dtype
        assert leaf.tobytes() == value.tobytes()
    again = Layout.from_dict(layout.to_dict())
    assert again == layout
    assert again.cuts(3) == layout.cuts(3)


def test_what_workers_see_rounded_travels_with_a_layout_and_makes_no_other() -> None:
    layout = Layout.of([np.ones(3, np.float32), np.ones(2)])
    rounded = layout.for_workers("bfloat16")
    assert rounded == layout and rounded.to_dict() == layout.to_dict()
    for kept in (rounded, pickle.loads(pickle.dumps(rounded))):
        assert kept.pull_dtypes == {"float32": BFLOAT16, "float64": np.float64}
    assert layout.pull_dtypes == {"float32": np.float32, "float64": np.float64}


def test_dict_keys_are_sorted_and_paths_name_the_leaves() -> None:
    tree = {"b": [np.ones(2, np.float32)], "a": (np.ones(3, np.float32), {"z": np.float32(1)})}
    assert [t.path for t in Layout.of(tree).tensors] == ["a/0", "a/1/z", "b/0"]


def test_the_order_in_which_keys_were_given_is_kept_and_makes_no_other_layout() -> None:
    one = np.ones(1, np.float32)
    tree = {"z": {"weight": one, "bias": one}, "a": [one, OrderedDict(w=one, b=one)]}
    layout = Layout.of(tree)
    expected = ["z/weight", "z/bias", "a/0", "a/1/w", "a/1/b"]
    for kept in (layout, Layout.from_dict(layout.to_dict()), pickle.loads(pickle.dumps(layout))):
        assert [kept.tensors[i].path for i in kept.given_order] == expected
    other = Layout.of({"a": tree["a"], "z": {"bias": one, "weight": one}})
    assert other == layout
    assert other.given_order != layout.given_order
    assert other != Layout.of({"z": tree["z"], "a": tuple(tree["a"])})


def test_a_list_is_taken_for_a_tuple_where_the_paths_agree() -> None:
    layout = Layout.of((np.ones(2, np.float32), np.ones(3, np.float32)))
    assert [
        x.shape
        for x in layout.leaves([np.ones(2, np.float32), np.ones(3, np.float32)], what="gradients")
    ] == [(2,), (3,)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"tensors": [["w", [2], "int8", 0, 2]]},
            "tensor 'w' with shape .2., dtype 'int8' cannot lie at",
        ),
        ({"tensors": [["w", [2], "float32", 1, 3]]}, "cannot lie at .1, 3."),
        ({"tensors": [["w", [2], "float32", 0, 3]]}, "cannot lie at .0, 3."),
        ({"tensors": [["w", [-1, -2], "float32", 0, 2]]}, "cannot lie at .0, 2."),
        ({"tree": {"dict": [["x", 0]]}}, "its tree and its list of tensors name different tensors"),
        ({"tree": {"set": [0]}}, "expected a node of a tree"),
        ({"tree": "w"}, "expected a node of a tree, got 'w'"),
    ],
)
def test_plain_data_that_contradicts_itself_is_refused(change: dict[str, Any], told: str) -> None:
    data = Layout.of({"w": np.ones(2, np.float32)}).to_dict()
    with pytest.raises(StructureError, match=told):
        Layout.from_dict({**data, **change})
