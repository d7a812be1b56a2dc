"""Picking leaves and copying containers agree with what optree does, for every tree of ours."""

from typing import Any

import numpy as np
import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.errors import StructureError
from distnadam.tensors.layout import Layout
from distnadam.tensors.plain_spec import PlainSpec
from distnadam.tensors.skeleton import skeleton_of

TREES = st.recursive(
    st.just(0.5),
    lambda children: (
        st.dictionaries(st.sampled_from("abcdef"), children, max_size=4)
        | st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
    ),
    max_leaves=12,
)


def structure(tree: Any) -> Any:
    return optree.tree_structure(tree, none_is_leaf=True)


def containers(tree: Any) -> list[int]:
    """The identities of a tree's containers that can be changed."""
    if not isinstance(tree, (dict, list, tuple)):
        return []
    children = tree.values() if isinstance(tree, dict) else tree
    inner = [number for child in children for number in containers(child)]
    return [*inner, *([] if isinstance(tree, tuple) else [id(tree)])]


@given(tree=TREES, other=TREES)
def test_leaves_are_picked_in_optrees_order_from_trees_of_the_same_containers_alone(
    tree: Any, other: Any
) -> None:
    spec = PlainSpec(skeleton_of(tree))
    numbered = optree.tree_unflatten(structure(tree), range(structure(tree).num_leaves))
    picked = spec.pick(numbered)
    assert picked is not None and list(picked) == optree.tree_leaves(numbered, none_is_leaf=True)
    found = spec.pick(other)
    if structure(other) == structure(tree):
        assert found is not None and len(found) == structure(tree).num_leaves
    elif found is not None:  # a container stands where a leaf should
        assert any(isinstance(leaf, (dict, list, tuple)) for leaf in found)


@given(tree=TREES)
def test_a_copy_has_the_same_leaves_in_containers_of_its_own(tree: Any) -> None:
    copy = PlainSpec(skeleton_of(tree)).copied(tree)
    assert copy == tree and structure(copy) == structure(tree)
    assert not set(containers(copy)) & set(containers(tree))


def test_keys_keep_the_order_in_which_they_were_given() -> None:
    tree = {"z": 1.0, "a": {"y": 2.0, "b": 3.0}}
    spec = PlainSpec(skeleton_of(tree))
    assert spec.pick(tree) == [3.0, 2.0, 1.0]
    assert list(spec.copied(tree)) == ["z", "a"] and list(spec.copied(tree)["a"]) == ["y", "b"]


def test_a_container_in_the_place_of_a_tensor_is_named_by_its_path() -> None:
    layout = Layout.of({"w": np.ones(2, np.float32), "x": np.ones(3, np.float32)})
    with pytest.raises(StructureError, match="'w/0' is not a tensor of the model"):
        layout.leaves({"w": [np.ones(2, np.float32)], "x": np.ones(3, np.float32)}, what="g")


def test_what_a_user_does_to_a_returned_tree_is_not_in_the_next() -> None:
    ones = {"layers": [{"w": np.ones(2, np.float32)}], "b": (np.ones(3, np.float32),)}
    with DistNadam(backend="local").build(ones) as optimizer:
        worker = optimizer.worker(0)
        for _ in range(4):
            tree = worker.step(ones)
            assert structure(tree) == structure(ones)
            tree["layers"][0].pop("w")
            tree["layers"].append("more")
            tree["extra"] = 1
