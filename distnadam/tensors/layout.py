"""Where each tensor of a model lies in one flat element space per dtype, and how those are cut.

A layout knows names, shapes and offsets; it holds no values. Tensors follow the tree's order (dict
keys sorted; the skeleton keeps the order in which they were given), ranges are half-open, and cuts
fall on a grid of `CHUNK` elements that starts again at each tensor, so that a chunk is never in two
shards.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np
import optree

from distnadam.errors import StructureError
from distnadam.tensors.arrays import (
    NAME_OF,
    SPACE_OF,
    SPACES,
    Array,
    Flat,
    dtype_of,
    dtypes_of,
    own_errors,
)
from distnadam.tensors.containers import plain_tree
from distnadam.tensors.leaves import (
    are_plain,
    as_numpy,
    describe_leaf,
    kind_of,
    parameter,
    remedy_of,
)
from distnadam.tensors.plain_spec import PlainSpec
from distnadam.tensors.skeleton import decode, encode, in_given_order, skeleton_of

CHUNK = 1024
"""Elements in one piece of the grid on which ranges are cut and norms are summed."""

Range = tuple[int, int]
Ranges = dict[str, Range]
"""One half-open range of elements per space: what one shard holds."""


def sizes_of(ranges: Ranges) -> dict[str, int]:
    """Return the number of elements of each space's range."""
    return {space: end - begin for space, (begin, end) in ranges.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: path, shape, dtype, and the elements [begin, end) of its space."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int

    @cached_property
    def space(self) -> str:
        """The dtype of the space that holds its master copy and slots."""
        return SPACE_OF[self.dtype]


@dataclass(frozen=True)
class Segment:
    """The part [begin, end) of a tensor that lies in a range, in offsets of the space.

    `tensor` is the tensor's index in the layout.
    """

    tensor: int
    begin: int
    end: int


class Layout:
    """The tensors of one model and the skeleton of its tree.

    Attributes:
        pull_dtypes: the dtype in which workers see the parameters of each space.
        frozen: the indices of tensors that no step changes.
        optional: the indices of tensors whose gradient may be None: the frozen ones, or all.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        skeleton: Any,
        pull_dtype: str | None = None,
        frozen: frozenset[int] = frozenset(),
        *,
        may_lack: bool = False,
    ) -> None:
        self.tensors = tuple(tensors)
        self.skeleton = skeleton
        self.frozen = frozen
        self.optional = frozenset(range(len(self.tensors))) if may_lack else frozen
        self._pull_dtype = pull_dtype
        self._other: tuple[Any, list[int]] = (None, [])  # the last other containers, their order
        ends = [(tensor.space, tensor.end) for tensor in self.tensors]
        used = {space for space, _ in ends}
        self.sizes = {s: max(end for space, end in ends if space == s) for s in SPACES if s in used}
        self.pull_dtypes = dtypes_of(self.sizes, float32=pull_dtype)

    @classmethod
    @own_errors()
    def of(cls, params: Any) -> "Layout":
        """Lay out a tree of arrays.

        Raises:
            StructureError: a leaf or a container cannot be one; the message names its path.
        """
        plain = plain_tree(params)
        paths, leaves = _flatten(plain)
        if not leaves:
            raise StructureError(
                f"params: expected at least one array, got none in {type(params).__name__} "
                f"{params!r}"
            )
        tensors, used = [], dict.fromkeys(SPACES, 0)
        for path, leaf in zip(paths, leaves, strict=True):
            array = parameter(path, leaf)
            space = SPACE_OF[array.dtype.name]
            begin, used[space] = used[space], used[space] + array.size
            tensors.append(TensorSpec(path, array.shape, array.dtype.name, begin, used[space]))
        _check_distinct(paths, what="params")
        return cls(tensors, skeleton_of(plain))

    def for_workers(
        self, pull_dtype: str | None, frozen: Iterable[int] = (), *, may_lack: bool = False
    ) -> "Layout":
        """Return the same layout, whose float32 space workers see in another dtype (None for its
        own), and of which they give no gradients of the frozen tensors, or of any that they lack.
        """
        known = self.tensors, self.skeleton
        return Layout(*known, pull_dtype, frozenset(frozen), may_lack=may_lack)

    @cached_property
    def _treespec(self) -> optree.PyTreeSpec:
        return optree.tree_structure(self.skeleton, none_is_leaf=True)

    @cached_property
    def plain_spec(self) -> PlainSpec:
        """The containers of the model's trees."""
        return PlainSpec(self.skeleton)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tensor.shape for tensor in self.tensors]

    @property
    def num_elements(self) -> int:
        """Elements of all tensors together."""
        return sum(self.sizes.values())

    @property
    def array_bytes(self) -> int:
        """Bytes of the parameters' master copies, or of another array of the state."""
        return sum(n * np.dtype(space).itemsize for space, n in self.sizes.items())

    @cached_property
    def given_order(self) -> list[int]:
        """Each tensor's index, in the order in which `build` was given them: dict keys unsorted.

        Frameworks that match by position list a model's parameters so.
        """
        return list(in_given_order(self.skeleton))

    def leaves(self, tree: Any, *, what: str) -> list[Array]:
        """Return the tree's leaves as arrays, in the layout's order.

        Raises:
            StructureError: a tensor is missing, unexpected, None, of another shape or no
                floating-point array; `what` begins the message.
        """
        return self.gradients(tree, what=what, optional=frozenset())[0]

    def gradients(
        self, tree: Any, *, what: str, optional: frozenset[int] | None = None
    ) -> tuple[list[Array], frozenset[int]]:
        """Return the leaves of a tree of gradients as `leaves` does, zeros for those at `optional`,
        the layout's own if not given, that are None; and which of these are not frozen.
        """
        picked = self.plain_spec.pick(tree)
        may_lack = self.optional if optional is None else optional
        absent: frozenset[int] = frozenset()
        if picked is not None and may_lack:
            absent = may_lack.intersection([i for i, leaf in enumerate(picked) if leaf is None])
            if absent:
                picked = [self._zeros[i] if i in absent else leaf for i, leaf in enumerate(picked)]
        if picked is not None and are_plain(picked, self._shapes):
            return list(picked), absent - self.frozen  # nearly every tree
        leaves = self.leaves_as_given(tree, what=what)
        absent = frozenset(index for index in may_lack if leaves[index] is None)
        return [
            self._zeros[index] if index in absent else self.checked(index, leaf, what=what)
            for index, leaf in enumerate(leaves)
        ], absent - self.frozen

    @cached_property
    def _zeros(self) -> list[Array]:
        """What stands for gradients that are absent, of no memory of its own."""
        return [np.broadcast_to(np.zeros((), t.space), t.shape) for t in self.tensors]

    def leaves_as_given(self, tree: Any, *, what: str) -> list[Any]:
        """Return the tree's leaves in the layout's order, whatever they are.

        Raises:
            StructureError: a path is missing or unexpected; `what` begins the message.
        """
        try:
            leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
        except RecursionError as error:
            raise StructureError(
                f"{what}: is nested deeper than any tree that build takes, or in itself"
            ) from error
        if spec == self._treespec:
            return leaves
        known, order = self._other
        if spec != known:
            order = self._order_of_other_containers(tree, what)
            self._other = (spec, order)
        return [leaves[index] for index in order]

    @own_errors()
    def flat(self, tree: Any, *, what: str) -> Flat:
        """Return the tree's values in new flat storage, cast to the spaces' dtypes."""
        flat = {space: np.empty(n, space) for space, n in self.sizes.items()}
        for tensor, leaf in zip(self.tensors, self.leaves(tree, what=what), strict=True):
            flat[tensor.space][tensor.begin : tensor.end] = leaf.reshape(-1)
        return flat

    def views(self, flat: Flat) -> list[Array]:
        """Return one array per tensor, each a view of `flat` in its shape and its space's dtype."""
        return [flat[t.space][t.begin : t.end].reshape(t.shape) for t in self.tensors]

    @cached_property
    def unflatten(self) -> Callable[[Iterable[Any]], Any]:
        """Returns leaves in the structure given to `build`."""
        return self._treespec.unflatten

    @own_errors()
    def tree(self, flat: Flat) -> Any:
        """Return parameters in the structure given to `build`, each in its own dtype.

        Tensors kept in their own dtype are views of `flat`; one of shape () is a NumPy scalar.
        """
        views = zip(self.tensors, self.views(flat), strict=True)
        return self.unflatten(
            [_leaf(v if v.dtype.name == t.dtype else v.astype(dtype_of(t.dtype))) for t, v in views]
        )

    def cuts(self, shares: int | Sequence[int]) -> list[Ranges]:
        """Return each shard's ranges, which cover every space in order.

        Args:
            shares: the shards' shares of each space, none below 0 and some above, or the number of
                shards of equal ones. They are met as nearly as the chunk grid allows; ranges may be
                empty.
        """
        shares = (1,) * shares if isinstance(shares, int) else shares
        *before, total = accumulate(shares, initial=0)
        ranges: list[Ranges] = [{} for _ in shares]
        for space, size in self.sizes.items():
            begins = [t.begin for t in self.tensors if t.space == space]
            bounds = [*(_snap(size * share // total, begins, size) for share in before), size]
            for shard, (begin, end) in enumerate(pairwise(bounds)):
                ranges[shard][space] = (begin, end)
        return ranges

    def segments(self, space: str, begin: int, end: int) -> Iterator[Segment]:
        """Yield, in order, the parts of tensors in elements [begin, end) of a space; none empty."""
        for index, tensor in enumerate(self.tensors):
            low, high = max(begin, tensor.begin), min(end, tensor.end)
            if tensor.space == space and low < high:
                yield Segment(index, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (for msgpack) that `from_dict` takes."""
        return {
            "tensors": [[t.path, list(t.shape), t.dtype, t.begin, t.end] for t in self.tensors],
            "tree": encode(self.skeleton),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layout":
        """Return the layout that `to_dict` described.

        Raises:
            StructureError: the description contradicts itself.
        """
        tensors, used = [], dict.fromkeys(SPACES, 0)
        for path, shape, dtype, begin, end in data["tensors"]:
            if (
                dtype not in SPACE_OF
                or begin != used[SPACE_OF[dtype]]
                or end - begin != prod(shape)
                or min(shape, default=0) < 0
            ):
                raise StructureError(
                    f"layout: tensor {path!r} with shape {shape}, dtype {dtype!r} cannot lie at "
                    f"[{begin}, {end})"
                )
            used[SPACE_OF[dtype]] = end
            tensors.append(TensorSpec(path, tuple(shape), dtype, begin, end))
        layout = cls(tensors, decode(data["tree"]))
        paths, indices = _flatten(layout.skeleton)
        if paths != [t.path for t in tensors] or indices != list(range(len(tensors))):
            raise StructureError("layout: its tree and its list of tensors name different tensors")
        return layout

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same tensors in the same tree, whatever the order of its keys."""
        if not isinstance(other, Layout):
            return False
        return self.tensors == other.tensors and self._treespec == other._treespec

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        may_lack = len(self.optional) == len(self.tensors)
        make = partial(Layout, may_lack=may_lack)
        return make, (self.tensors, self.skeleton, self._pull_dtype, self.frozen)

    def _order_of_other_containers(self, tree: Any, what: str) -> list[int]:
        """Return each tensor's index among the leaves of a tree of other containers, by path.

        Raises:
            StructureError: naming paths that are missing or unexpected.
        """
        paths, _ = _flatten(tree)
        _check_distinct(paths, what=what)
        index = {path: i for i, path in enumerate(paths)}
        expected = {tensor.path for tensor in self.tensors}
        missing = [tensor.path for tensor in self.tensors if tensor.path not in index]
        extra = [path for path in paths if path not in expected]
        if not missing and not extra:
            return [index[tensor.path] for tensor in self.tensors]
        faults = [f"{p!r} is missing" for p in missing[:3]] + [
            f"{p or 'the root'!r} is not a tensor of the model" for p in extra[:3]
        ]
        given = (
            f"{kind_of(tree)}{remedy_of(tree, np.dtype(object))}" if paths == [""] else len(paths)
        )
        raise StructureError(
            f"{what}: {', '.join(faults)}; expected the {len(expected)} tensors given to build, "
            f"got {given}"
        )

    def checked(self, index: int, leaf: Any, *, what: str) -> Array:
        """Return one tensor's leaf as an array; raise StructureError as `leaves`."""
        tensor = self.tensors[index]
        try:
            array = as_numpy(leaf)
        except StructureError as error:
            raise StructureError(f"{what}: {tensor.path!r}: {error}") from error.__cause__
        if array.shape != tensor.shape or array.dtype not in NAME_OF:
            raise StructureError(
                f"{what}: {tensor.path!r}: expected shape {tensor.shape} and a floating-point "
                f"dtype, got {describe_leaf(leaf, array)}"
            )
        return array


def _flatten(tree: Any) -> tuple[list[str], list[Any]]:
    accessors, leaves, _ = optree.tree_flatten_with_path(tree, none_is_leaf=True)
    return ["/".join(str(part) for part in path) for path in accessors], leaves


def _check_distinct(paths: Sequence[str], *, what: str) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise StructureError(f"{what}: two tensors have the path {min(twice)!r}; rename a key")


def _leaf(array: Array) -> Any:
    return array if array.shape else array[()]


def _snap(target: int, begins: Sequence[int], size: int) -> int:
    """Return the grid point nearest to `target` (the lower one of two)."""
    if not begins or target <= 0:
        return 0
    start = begins[bisect_right(begins, target) - 1]
    low = start + (target - start) // CHUNK * CHUNK
    following = begins[bisect_right(begins, target)] if target < begins[-1] else size
    high = min(low + CHUNK, following)
    return low if target - low <= high - target else high
