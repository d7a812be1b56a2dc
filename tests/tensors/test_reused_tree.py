"""Whoever is given a tree cannot tell that its containers were given out before."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.tensors import reused_tree
from distnadam.tensors.plain_spec import PlainSpec
from distnadam.tensors.reused_tree import ReusedTree
from distnadam.tensors.skeleton import skeleton_of
from tests.tensors.test_plain_spec import TREES, containers, structure

CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "adds": lambda tree: tree.__setitem__("more", 1),
    "replaces": lambda tree: tree.update(dict.fromkeys(tree, "other")),
    "replaces one": lambda tree: tree and tree.__setitem__(min(tree), None),
    "deletes one": lambda tree: tree and tree.pop(min(tree)),
    "deletes the last": lambda tree: tree and tree.popitem(),
    "deletes and puts back": lambda tree: tree and tree.__setitem__(min(tree), tree.pop(min(tree))),
    "merges": lambda tree: tree.__ior__({"a": 2}),
    "clears": lambda tree: tree.clear(),
}


def dicts_in(tree: Any) -> list[dict[str, Any]]:
    if not isinstance(tree, (dict, list, tuple)):
        return []
    children = tree.values() if isinstance(tree, dict) else tree
    own = [tree] if isinstance(tree, dict) else []
    return own + [found for child in children for found in dicts_in(child)]


def numbered(tree: Any) -> Any:
    return optree.tree_unflatten(structure(tree), map(float, range(structure(tree).num_leaves)))


@given(tree=TREES, data=st.data())
def test_each_tree_is_whole_and_nobody_elses_whatever_is_done_to_those_before(
    tree: Any, data: st.DataObject
) -> None:
    tree = numbered(tree)
    reused = ReusedTree(PlainSpec(skeleton_of(tree)), tree)
    wanted = repr(tree)  # with the order of its keys
    held: list[Any] = []  # trees, and dicts in them, that somebody has
    for _ in range(data.draw(st.integers(1, 12))):
        got = reused.get()
        assert repr(got) == wanted
        assert not set(containers(got)) & {number for each in held for number in containers(each)}
        dicts = dicts_in(got)
        for each in data.draw(st.lists(st.sampled_from(dicts), max_size=2)) if dicts else ():
            CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](each)
        if data.draw(st.booleans()):
            held.append(data.draw(st.sampled_from([got, *dicts])))
        for each in data.draw(st.lists(st.sampled_from(held), max_size=2)) if held else ():
            for inner in dicts_in(each)[:2]:
                CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](inner)
        if held and data.draw(st.booleans()):
            held.pop(data.draw(st.integers(0, len(held) - 1)))
        got = dicts = each = inner = None


def test_a_tree_that_nobody_has_is_given_out_again_and_one_that_somebody_has_is_not() -> None:
    tree = {"a": {"b": 1.0, "c": 2.0}, "d": 3.0}
    reused = ReusedTree(PlainSpec(skeleton_of(tree)), tree)
    first = id(reused.get())
    assert id(reused.get()) == first
    inner = reused.get()["a"]
    assert reused.get()["a"] is not inner
    kept = reused.get()
    assert reused.get() is not kept


def test_where_changes_are_not_counted_each_tree_is_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reused_tree._versions_are_known.cache_clear()
    monkeypatch.setattr(reused_tree, "_VERSION", 16)  # its length
    try:
        assert not reused_tree._versions_are_known()
        reused = ReusedTree(PlainSpec(skeleton_of({"a": 1.0})), {"a": 1.0})
        reused.get()["a"] = 2.0
        assert reused.get() == {"a": 1.0}
    finally:
        reused_tree._versions_are_known.cache_clear()


def test_a_workers_trees_are_whole_though_the_user_keeps_and_changes_those_before() -> None:
    ones = {"layers": {"w": np.ones(2, np.float32)}, "b": np.ones(3, np.float32)}
    with DistNadam(backend="local").build(ones) as optimizer:
        worker = optimizer.worker(0)
        kept: list[Any] = []
        for number in range(12):
            tree = worker.step(ones)
            assert structure(tree) == structure(ones)
            wanted = optimizer.get_params()
            assert tree["layers"]["w"].tolist() == wanted["layers"]["w"].tolist()
            assert tree["b"].tolist() == wanted["b"].tolist()
            assert worker.parameters() is not tree
            if number % 3 == 0:
                kept.append(tree["layers"])
            tree["layers"].pop("w")
            tree["extra"] = 1
