"""Trees that one compiled call looks at and copies: with the result, or the error, that they have
where NumPy does it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.plain_gradients import PlainGradients
from distnadam.errors import StructureError
from distnadam.nadam import gather, gather_abi
from distnadam.tensors.arrays import empty_flat
from distnadam.tensors.layout import Layout

SHAPES = [(3,), (), (2, 2), (0,), (1, 5), (67,), (9, 41), (2, 1, 3)]


class Masked(np.ndarray):
    """A subclass, which may be anything."""


OTHERS: dict[str, Any] = {
    "alike": np.ones(3, np.float32),
    "read-only": np.frombuffer(np.ones(3, np.float32).tobytes(), np.float32),
    "not contiguous": np.arange(6, dtype=np.float32)[::2],
    "backwards": np.arange(3, dtype=np.float32)[::-1],
    "spread": np.broadcast_to(np.float32(2), (3,)),
    "not aligned": np.frombuffer(bytes(13), np.float32, 3, 1),
    "wider": np.ones(3, np.float64),
    "narrower": np.ones(3, np.float16),
    "bfloat16": np.ones(3, ml_dtypes.bfloat16),
    "of another byte order": np.ones(3, ">f4"),
    "of a dtype with metadata": np.ones(3, np.dtype("f4", metadata={"unit": "m"})),
    "of a subclass": np.ones(3, np.float32).view(Masked),
    "masked": np.ma.MaskedArray(np.ones(3, np.float32), [False, True, False]),
    "of another shape": np.ones(4, np.float32),
    "of more dimensions": np.ones((3, 1), np.float32),
    "of whole numbers": np.ones(3, np.int32),
    "objects": np.array([1.0, None, 2.0], object),
    "a list": [1.0, 2.0, 3.0],
    "a number": 1.0,
    "a small object": object(),
    "nothing": None,
    "not a number": np.array([1, np.nan, 2], np.float32),
    "infinite": np.array([1, 2, -np.inf], np.float32),
    "too large to square": np.array([1e25, 0, 0], np.float32),
    "large together": np.full(3, 1.5e19, np.float32),
}


def tree_of(dtype: str, number: int = 40) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = [SHAPES[i % len(SHAPES)] for i in range(number)]
    return {
        f"{i:04d}": np.asarray(rng.standard_normal(s).astype(dtype)) for i, s in enumerate(shapes)
    }


def filled(layout: Layout, tree: Any, *, compiled: bool) -> Any:
    memory = empty_flat(layout.sizes)
    buffer = GradientBuffer(layout, "worker 7", memory, compiled=compiled)
    try:
        rejection = buffer.fill(tree)
    except StructureError as error:
        return str(error)
    return rejection, {space: values.tobytes() for space, values in buffer.flat.items()}


@pytest.mark.parametrize("place", [0, 16, 32])
@pytest.mark.parametrize("what", OTHERS)
def test_a_compiled_copy_takes_what_numpy_takes_and_refuses_what_is_refused(
    what: str, place: int
) -> None:
    tree = tree_of("float32")
    layout = Layout.of(tree)
    tree[f"{place:04d}"] = OTHERS[what]
    assert filled(layout, tree, compiled=True) == filled(layout, tree, compiled=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", [1, 8, 3000])
def test_plain_trees_are_copied_by_it(dtype: str, number: int) -> None:
    tree = tree_of(dtype, number)
    layout = Layout.of(tree)
    memory = empty_flat(layout.sizes)
    assert PlainGradients(layout, memory).copy({"other": 1}) is None
    assert PlainGradients(layout, memory).copy(tree) == ()
    whole = np.concatenate([array.ravel() for array in tree.values()])
    assert memory[dtype].tobytes() == whole.tobytes()


def test_an_array_that_has_changed_since_the_last_step_is_looked_at_again() -> None:
    tree = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}
    buffer = GradientBuffer(layout := Layout.of(tree), "worker 7", empty_flat(layout.sizes))
    assert buffer.fill(tree) is None
    tree["a"].shape = (3, 2)
    with pytest.raises(StructureError, match=r"'a': expected shape \(2, 3\)"):
        buffer.fill(tree)
    tree["a"].shape = (2, 3)
    tree["b"].resize(100_000, refcheck=False)  # its memory is elsewhere
    tree["b"].resize(4, refcheck=False)
    tree["b"][:] = 5
    assert buffer.fill(tree) is None
    assert buffer.flat["float32"].tolist() == [1] * 6 + [5] * 4


def test_a_tree_that_is_refused_leaves_what_was_pushed_by_tensor() -> None:
    model = {"a": np.zeros(3, np.float32), "b": np.zeros(4, np.float32)}
    buffer = GradientBuffer(layout := Layout.of(model), "worker 7", empty_flat(layout.sizes))
    buffer.write("a", np.full(3, 2, np.float32))
    with pytest.raises(StructureError, match="'b'"):
        buffer.fill({"a": np.ones(3, np.float32), "b": np.ones(5, np.float32)})
    buffer.write("b", np.full(4, 3, np.float32))
    assert buffer.finish() is None
    assert buffer.flat["float32"].tolist() == [2] * 3 + [3] * 4


ELSEWHERE = {
    "SIZE": 0,
    "ITEMS": 8,
    "TYPE": 0,
    "DATA": 40,
    "DIMENSIONS": 0,
    "SHAPE": 16,
    "DESCR": 48,
    "FLAGS": 24,
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_where_objects_lie_otherwise_in_memory_nothing_relies_on_it(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gather._are_as_known("float32")
    monkeypatch.setattr(gather_abi, place, ELSEWHERE[place])
    assert not gather._are_as_known("float32")


def test_without_a_compiler_or_compiled_code_numpy_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError("no memory can be executed here")

    monkeypatch.setattr(gather, "_loaded", {})
    monkeypatch.setattr(gather, "cached_code", refuse)
    tree = tree_of("float32")
    layout = Layout.of(tree)
    assert PlainGradients(layout, empty_flat(layout.sizes)).copy(tree) is None
    assert filled(layout, tree, compiled=True) == filled(layout, tree, compiled=False)


CONTAINERS = st.recursive(
    st.just(None),
    lambda children: (
        st.dictionaries(st.sampled_from(["a", "bb", "c", "long name", "é", 7, 1000]), children)
        | st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
    ),
    max_leaves=16,
)


def fresh(key: Any) -> Any:
    """Return an equal key that is another object."""
    return "".join([*key]) if isinstance(key, str) else int(str(key))


class OtherDict(dict[Any, Any]):
    """A subclass, which may be anything."""


Items = list[tuple[Any, Any]]
CHANGES: dict[str, Callable[[Items], Items]] = {
    "in another order": lambda items: items[1:] + items[:1],
    "with other keys": lambda items: [(fresh(key), child) for key, child in items],
    "with less": lambda items: items[1:],
    "with more": lambda items: [*items, ("more", np.ones(2, np.float32))],
    "with another key": lambda items: [*items[:-1], *(("more", c) for _, c in items[-1:])],
}
KINDS = {dict: OtherDict, list: tuple, tuple: list}


def otherwise(tree: Any, data: st.DataObject) -> Any:
    """Return a tree of containers of its own, some of them not as they were, sometimes."""
    if not isinstance(tree, (dict, list, tuple)):
        return tree
    how = data.draw(st.sampled_from([*CHANGES, "no tree", "of another kind", *[""] * 15]))
    if how == "no tree":
        return data.draw(st.sampled_from([None, 1.0, np.ones(3, np.float32), range(2)]))
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    changed = CHANGES.get(how, list)([(key, otherwise(child, data)) for key, child in items])
    kind: Any = KINDS[type(tree)] if how == "of another kind" else type(tree)
    return kind(changed if isinstance(tree, dict) else [child for _, child in changed])


@given(tree=CONTAINERS, data=st.data())
def test_whatever_the_containers_are_the_compiled_copy_does_what_numpy_does(
    tree: Any, data: st.DataObject
) -> None:
    spec = optree.tree_structure(tree, none_is_leaf=True)
    if not spec.num_leaves:
        return
    dtypes = st.sampled_from([np.float32, np.float32, np.float64])
    shapes = st.sampled_from([SHAPES[0], *SHAPES])

    def leaf() -> Any:
        return np.zeros(data.draw(shapes), data.draw(dtypes))

    model = optree.tree_unflatten(spec, [leaf() for _ in range(spec.num_leaves)])
    try:
        layout = Layout.of(model)
    except StructureError:  # of keys that no checkpoint can hold
        return
    buffers = [
        GradientBuffer(layout, "worker 7", empty_flat(layout.sizes), compiled=compiled)
        for compiled in (True, False)
    ]
    given_before: list[Any] = []
    numbers = itertools.count(1)
    for _ in range(data.draw(st.integers(1, 5))):
        full = optree.tree_map(lambda x: np.full_like(x, next(numbers)), model, none_is_leaf=True)
        leaves = optree.tree_leaves(full, none_is_leaf=True)
        if data.draw(st.integers(0, 3)) == 0:
            place = data.draw(st.integers(0, len(leaves) - 1))
            leaves[place] = OTHERS[data.draw(st.sampled_from(sorted(OTHERS)))]
        full = otherwise(
            optree.tree_unflatten(optree.tree_structure(full, none_is_leaf=True), leaves), data
        )
        if given_before and data.draw(st.integers(0, 3)) == 0:
            full = data.draw(st.sampled_from(given_before))
        given_before.append(full)
        found = []
        for buffer in buffers:
            try:
                rejection = buffer.fill(full)
            except StructureError as error:
                found.append(str(error))
            else:
                memory = {space: values.tobytes() for space, values in buffer.flat.items()}
                found.append((rejection, memory))
        assert found[0] == found[1]


@pytest.mark.parametrize("is_known", [True, False], ids=["read", "asked for"])
def test_leaves_are_told_by_their_keys_whoever_made_these_and_in_whatever_order(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gather.dicts_are_as_known()
    monkeypatch.setattr(gather, "dicts_are_as_known", lambda: is_known)
    names = [f"layer {i}" for i in range(9)]
    layout = Layout.of({name: np.zeros(3, np.float32) for name in names})
    memory = empty_flat(layout.sizes)
    plain = PlainGradients(layout, memory)
    for number in range(20):
        order = names[number:] + names[:number] if number % 3 else names
        tree = {fresh(name): np.full(3, names.index(name), np.float32) for name in order}
        assert plain.copy(tree) == ()
        assert memory["float32"].reshape(9, 3)[:, 1].tolist() == [*range(9)]
        assert plain.copy({**tree, "more": tree[names[3]]}) is None
        tree["another"] = tree.pop(names[number % 9])
        assert plain.copy(tree) is None


class Named:
    """Its instances' dicts share their keys."""

    def __init__(self, **given: Any) -> None:
        self.a, self.b, self.c = given["a"], given["b"], given["c"]


def test_dicts_whose_items_lie_otherwise_are_asked_for_them() -> None:
    tree = {name: np.full(3, number, np.float32) for number, name in enumerate("abc")}
    layout = Layout.of(tree)
    memory = empty_flat(layout.sizes)
    plain = PlainGradients(layout, memory)
    gone = {"x": 1, **tree, "y": 2}
    del gone["x"], gone["y"]
    mixed = {1: 2, **tree}
    del mixed[1]
    for each in (tree, gone, mixed, vars(Named(**tree)), dict(mixed), tree | {}):
        memory["float32"][:] = -1
        assert plain.copy(each) == ()
        assert memory["float32"].reshape(3, 3)[:, 1].tolist() == [0, 1, 2]


DICTS_ELSEWHERE = {
    "SIZE": 24,
    "KEYS": 24,
    "VALUES": 24,
    "INDEX_BITS": 8,
    "KIND": 8,
    "ENTRIES": 16,
    "INDICES": 24,
    "STRINGS": 0,
}


@pytest.mark.parametrize("place", DICTS_ELSEWHERE)
def test_where_dicts_lie_otherwise_their_items_are_asked_for(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "KEYS":  # an address that is none would be followed
        monkeypatch.setattr(gather_abi, "VALUES", 32)
    monkeypatch.setattr(gather_abi, place, DICTS_ELSEWHERE[place])
    assert not gather.dicts_are_as_known.__wrapped__()
