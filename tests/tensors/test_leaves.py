"""A leaf is its numbers, or is refused by its path with the remedy."""

import time
from collections import OrderedDict, defaultdict
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import StructureError
from distnadam.tensors.layout import Layout

ONES = np.ones((2, 3), np.float32)


with catch_warnings():
    simplefilter("ignore", PendingDeprecationWarning)
    MATRIX = np.asmatrix(ONES)


class Wrapped:
    """What has a NumPy form and is none, as other libraries' arrays are."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self._array, Exception):
            raise self._array
        return self._array


class Sparse:
    """What SciPy's, JAX's and others' sparse arrays look like from outside."""

    shape = (2, 3)

    def todense(self) -> Any:
        return ONES


TAKEN = {
    "big-endian": ONES.astype(">f4"),
    "big-endian behind __array__": Wrapped(ONES.astype(">f4")),
    "a matrix": MATRIX,
    "a memory that is read-only": np.frombuffer(ONES.tobytes(), np.float32).reshape(2, 3),
    "a mask that hides nothing": np.ma.masked_array(ONES, np.zeros((2, 3), bool)),
    "no mask": np.ma.masked_array(ONES),
    "Fortran's order": np.asfortranarray(ONES),
    "a dtype with metadata": ONES.astype(np.dtype("f4", metadata={"a": 1})),
}
HIDDEN = np.ma.masked_array(ONES, [[0, 1, 0], [0, 0, 1]])
REFUSED = {
    "a mask": (HIDDEN, "a masked array that hides 2 of 6; say what they are, by .filled"),
    "a mask behind __array__": (Wrapped(HIDDEN), "masked array that hides 2 of 6"),
    "objects": (ONES.astype(object), r"object.*; give its .astype\(np.float32\)"),
    "an array that refuses": (
        Wrapped(TypeError("use .get()\nor not")),
        r"TypeError: use .get\(\)$",
    ),
    "an array that says nothing": (Wrapped(RuntimeError()), "RuntimeError: no reason given"),
    "a sparse array": (Sparse(), r"; give its .todense\(\)"),
    "a generator": ((x for x in ()), "generator.*; give a list, tuple or dict of arrays"),
    "a view of a dict": ({"a": 1}.items(), "dict_items"),
    "complex numbers": (ONES.astype(complex), "complex128"),
    "numbers of a record": (np.zeros((2, 3), "f4,f4"), "void64"),
    "text": ("ones", "str"),
    "more precision than there is": (
        ONES.astype(np.longdouble),
        r"float128.*; give its .astype\(np.float32\)",
    ),
}


@pytest.fixture
def optimizer() -> Any:
    with DistNadam(backend="local").build({"a": {"w": np.zeros((2, 3), np.float32)}}) as built:
        yield built


@pytest.mark.parametrize("leaf", TAKEN.values(), ids=TAKEN)
def test_an_array_of_any_make_counts_as_its_numbers(optimizer: Any, leaf: Any) -> None:
    with DistNadam(backend="local").build({"a": {"w": leaf}}) as built:
        assert np.array_equal(built.get_params()["a"]["w"], ONES)
    optimizer.apply_gradients({"a": {"w": ONES}})
    stepped = optimizer.get_params()["a"]["w"]
    with DistNadam(backend="local").build({"a": {"w": np.zeros_like(ONES)}}) as other:
        with other.worker(0) as worker:
            assert worker.step({"a": {"w": leaf}})["a"]["w"].tobytes() == stepped.tobytes()
            worker.push_tensor("a/w", leaf)
            worker.push().result()
        assert np.array_equal(
            other.get_gradients(lambda _: (0.0, {"a": {"w": leaf}}), stepped_tree(stepped))[0], ONES
        )
        other.set_weights([0, 1.0, leaf, leaf])
        assert np.array_equal(other.get_weights()[2], ONES)
        other.set_params({"a": {"w": leaf}})
        assert np.array_equal(other.get_params()["a"]["w"], ONES)


def stepped_tree(array: Any) -> Any:
    return {"a": {"w": array}}


@pytest.mark.parametrize(("leaf", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_more_or_less_than_its_numbers_is_refused_by_path(
    optimizer: Any, leaf: Any, told: str
) -> None:
    tree = {"a": {"w": leaf}}
    told = rf"(?s)'a/w'.*{told}"
    with pytest.raises(StructureError, match=told):
        DistNadam(backend="local").build(tree)
    with pytest.raises(StructureError, match=told):
        optimizer.apply_gradients(tree)
    with pytest.raises(StructureError, match=told):
        optimizer.set_params(tree)
    with pytest.raises(ValueError, match=told):
        optimizer.get_gradients(lambda _: (0.0, tree), {"a": {"w": ONES}})
    with optimizer.worker(0) as worker:
        with pytest.raises(StructureError, match=told):
            worker.push(tree)
        with pytest.raises(StructureError, match=told):
            worker.push_tensor("a/w", leaf)
        worker.step({"a": {"w": ONES}})
    with pytest.raises(StructureError, match=r"index 2: .*for m of 'a/w'"):
        optimizer.set_weights([0, 1.0, leaf, ONES])
    assert optimizer.iterations == 1


ORDERED = OrderedDict(z=np.full(2, 2, np.float32), a=np.full(2, 1, np.float32))


def test_dicts_of_every_kind_are_matched_by_path_in_any_order_of_keys() -> None:
    given: list[Any] = [
        ORDERED,
        dict(ORDERED),
        OrderedDict(sorted(ORDERED.items())),
        defaultdict(list, ORDERED),
    ]
    results = set()
    for first in given:
        with DistNadam(backend="local").build({"m": [first]}) as optimizer:
            assert type(optimizer.get_params()["m"][0]) is dict
            for tree in given + given:
                optimizer.apply_gradients({"m": [tree]})
            optimizer.set_params({"m": [OrderedDict(reversed(ORDERED.items()))]})
            results.add(b"".join(weight.tobytes() for weight in optimizer.get_weights()))
            assert optimizer.get_params()["m"][0]["z"].tolist() == [2, 2]
    assert len(results) == 1


def test_a_layout_with_an_order_of_its_own_keeps_nothing_of_it() -> None:
    layout = Layout.of({"a": ONES, "b": 2 * ONES})
    for tree in (OrderedDict(b=2 * ONES, a=ONES), {"a": ONES, "b": 2 * ONES}):
        assert [leaf[0, 0] for leaf in layout.leaves(tree, what="gradients")] == [1, 2]
    with pytest.raises(StructureError, match="'b' is missing, 'c' is not a tensor of the model"):
        layout.leaves(OrderedDict(c=ONES, a=ONES), what="gradients")


def test_two_gradients_of_one_path_are_refused(optimizer: Any) -> None:
    with pytest.raises(StructureError, match="two tensors have the path 'a/w'"):
        optimizer.apply_gradients({"a": {"w": ONES}, "a/w": ONES})


@pytest.mark.parametrize("given", [ONES, iter([ONES]), None, {}.values()])
def test_what_is_no_tree_is_called_by_its_kind(optimizer: Any, given: Any) -> None:
    with pytest.raises(StructureError, match="'a/w' is missing") as told:
        optimizer.apply_gradients(given)
    assert len(str(told.value)) < 250


def test_a_refusal_takes_time_in_proportion_to_the_tensors() -> None:
    seconds = {}
    for count in (1000, 16000):
        params = {f"t{i:06d}": np.float32(1) for i in range(count)}
        layout = Layout.of(params)
        renamed = {f"u{key}": value for key, value in params.items()}
        began = time.process_time()
        with pytest.raises(StructureError, match="'t000000' is missing"):
            layout.leaves(renamed, what="gradients")
        twice = {**params, **{f"{key}/x": value for key, value in params.items()}}
        twice |= {"t000000/x": 1, "t000000": {"x": np.float32(1)}}
        with pytest.raises(StructureError, match="two tensors have the path 't000000/x'"):
            Layout.of(
                {
                    key: np.float32(1) if key == "t000000/x" else value
                    for key, value in twice.items()
                }
            )
        seconds[count] = time.process_time() - began
    assert seconds[16000] < 16 * 4 * seconds[1000], "16 times as many; squared it were 256 times"


@pytest.mark.parametrize(
    "second", [ONES, ONES[:], ONES.T, MATRIX], ids=["same", "view", "turned", "matrix"]
)
def test_tied_parameters_are_said_once_by_name_and_stay_two(second: Any) -> None:
    with pytest.warns(UserWarning, match=r"two paths \('head' is 'embed'\)") as told:
        optimizer = DistNadam(backend="local").build({"embed": ONES, "head": second})
    assert [warning.filename for warning in told] == [__file__]
    with optimizer:
        grads = {"embed": ONES, "head": np.zeros(second.shape, np.float32)}
        optimizer.apply_gradients(grads)
        after = optimizer.get_params()
        assert (after["embed"] < 1).all() and (after["head"] == 1).all()


def test_equal_arrays_scalars_and_empty_ones_are_not_tied() -> None:
    one, empty = np.float32(1), np.ones(0, np.float32)
    tree = {"a": ONES, "b": ONES.copy(), "c": one, "d": one, "e": empty, "f": empty, "g": ONES[1:]}
    with DistNadam(backend="local").build(tree) as optimizer:
        assert optimizer.iterations == 0


def test_weights_come_in_whatever_holds_them_in_order(tmp_path: Any) -> None:
    with DistNadam(backend="local").build({"a": ONES, "b": np.ones(5, np.float32)}) as optimizer:
        optimizer.apply_gradients({"a": ONES, "b": np.ones(5)})
        weights = optimizer.get_weights()
        boxed = np.empty(len(weights), object)
        boxed[:] = weights
        np.save(tmp_path / "w.npy", boxed, allow_pickle=True)
        for given in (
            np.load(tmp_path / "w.npy", allow_pickle=True),
            iter(weights),
            tuple(weights),
            (weight for weight in weights),
            {str(i): w for i, w in enumerate(weights)}.values(),
        ):
            optimizer.set_weights(given)
            again = optimizer.get_weights()
            assert [w.tobytes() for w in again] == [w.tobytes() for w in weights]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"a": 1}, "got dict$"),
        (None, "got None$"),
        (3.0, "got float$"),
        ("abcdef", "got str$"),
        (np.ones((4, 1000)), "expected 6 arrays .iterations, m_schedule, ms, vs., got 4$"),
        (np.array({"a": ONES}, object), "got numpy's ndarray$"),
        ([], "got 0$"),
    ],
)
def test_what_holds_no_weights_is_named_and_not_printed(given: Any, told: str) -> None:
    with (
        DistNadam(backend="local").build({"a": ONES, "b": 2 * ONES}) as optimizer,
        pytest.raises(StructureError, match=told),
    ):
        optimizer.set_weights(given)


def test_a_refusal_of_nan_shows_the_nan_and_where() -> None:
    bad = ONES.copy()
    bad[1, 2] = np.nan
    with DistNadam(backend="local").build({"a": ONES}) as optimizer:
        with pytest.raises(StructureError, match=r"index 3: .*nan at index \(1, 2\), for v of 'a'"):
            optimizer.set_weights([0, 1.0, ONES, bad])
        with pytest.raises(StructureError, match=r"-1.0 at index \(0, 0\), for v of 'a'"):
            optimizer.set_weights([0, 1.0, ONES, -ONES])
        with pytest.raises(StructureError, match=r"'a': .*nan at index \(1, 2\)"):
            optimizer.set_params({"a": bad})
    with pytest.raises(StructureError, match=r"'a': .*nan at index \(1, 2\)"):
        DistNadam(backend="local").build({"a": bad})


def test_nan_that_the_user_lets_in_makes_the_round_trip_too() -> None:
    options = Options(check_gradients=False)
    with DistNadam(backend="local", options=options).build({"a": ONES}) as optimizer:
        optimizer.apply_gradients({"a": ONES * np.float32(np.nan)})
        weights, params = optimizer.get_weights(), optimizer.get_params()
        assert np.isnan(weights[2]).all()
        optimizer.set_weights(weights)
        optimizer.set_params(params)
        assert [w.tobytes() for w in optimizer.get_weights()] == [w.tobytes() for w in weights]
