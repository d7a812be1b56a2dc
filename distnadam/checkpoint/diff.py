"""Compares two checkpoints: settings, clock, and every tensor's bits.

How they are sharded, their options and the names of their runs do not count. Every byte of both is
verified; only a few tensors are in memory at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import read_shard, verify_files
from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.groups import changed_groups
from distnadam.tensors.arrays import Array, own_errors
from distnadam.tensors.layout import Layout, TensorSpec

_BATCH = 1 << 22
"""Elements of small neighbouring tensors that are read together."""


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """How one array of one tensor differs.

    Args:
        path: the tensor's.
        array: "params", "m", "v" or "ema".
        count: elements whose bits differ.
        elements: elements in all.
        max_abs: the largest absolute difference; None if it is not finite.
        max_ulp: the largest distance in units in the last place (-0 and 0 are neighbours).
        first_index: the index of the first element that differs.
        first: that element's value in each of the two.
    """

    path: str
    array: str
    count: int
    elements: int
    max_abs: float | None
    max_ulp: int
    first_index: tuple[int, ...]
    first: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CheckpointDiff:
    """All that differs between two checkpoints.

    Args:
        paths: the two directories.
        settings: both values of each setting that differs, by name, such as "config.lr" or
            "config.groups['**/bias']"; None where there is none.
        structure: a sentence for each tensor that only one has, or that differs in shape or dtype;
            the values of these are not compared.
        tensors: the arrays whose values differ.
    """

    paths: tuple[str, str]
    settings: dict[str, tuple[Any, Any]]
    structure: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]

    @property
    def same(self) -> bool:
        """Whether training continues from both with the same bits, given the same gradients."""
        return not (self.settings or self.structure or self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, in which a value that is not finite is a string."""
        data = asdict(self)
        for tensor in data["tensors"]:
            tensor["first"] = [
                value if np.isfinite(value) else str(value) for value in tensor["first"]
            ]
        return {"same": self.same, **data}


def compare(a: DirectoryLike, b: DirectoryLike) -> CheckpointDiff:
    """Compare two checkpoints; the path of a directory of them means its newest valid one.

    Raises:
        CheckpointError: naming the file that is refused.
    """
    found = [store.find(path)[:2] for path in (a, b)]
    for directory, manifest in found:
        verify_files(directory, manifest)
    layouts = [Layout.from_dict(manifest.layout) for _, manifest in found]
    first, second = ({t.path: t for t in layout.tensors} for layout in layouts)
    structure, differences = list(_structure(first, second)), []
    both = [
        t
        for t in layouts[0].tensors
        if t.path in second and (t.shape, t.dtype) == (second[t.path].shape, second[t.path].dtype)
    ]
    for batch in _batches(both):
        left, right = _read(*found[0], batch), _read(*found[1], [second[t.path] for t in batch])
        differences += [
            d
            for path, name in left
            if (path, name) in right  # else one keeps an average, which the settings say
            and (d := _values(path, name, left[path, name], right[path, name])) is not None
        ]
    return CheckpointDiff(
        paths=(str(found[0][0]), str(found[1][0])),
        settings=_settings(found[0][1], found[1][1]),
        structure=tuple(structure),
        tensors=tuple(differences),
    )


def _settings(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    """Return what differs in the clock, the config, the run and the caller's data."""

    def plain(manifest: Manifest) -> dict[str, Any]:
        clock = {
            name: getattr(manifest, name)
            for name in ("iterations", "m_schedule", "round", "skipped")
        }
        if manifest.clocks:
            paths = (path for path, *_ in manifest.layout["tensors"])
            at = manifest.clock
            clock |= {f"clock[{p!r}]": list(at.of_tensor(i)) for i, p in enumerate(paths)}
        # groups are compared one by one; "given" is what was asked for, and `config` what is
        apart = (("config", "groups"), ("run", "given"))
        return clock | {
            f"{part}.{k}": v
            for part in ("config", "run", "data")
            for k, v in getattr(manifest, part).items()
            if (part, k) not in apart
        }

    first, second = plain(a), plain(b)
    groups = changed_groups(a.config["groups"], b.config["groups"])
    return {
        k: (first.get(k), second.get(k))
        for k in {**first, **second}
        if first.get(k) != second.get(k)
    } | {f"config.{name}": both for name, both in groups.items()}


def _structure(a: Mapping[str, TensorSpec], b: Mapping[str, TensorSpec]) -> Iterator[str]:
    for path in {**a, **b}:
        if path not in a or path not in b:
            yield f"{path!r} is only in the {'first' if path in a else 'second'}"
        elif (a[path].shape, a[path].dtype) != (b[path].shape, b[path].dtype):
            yield (
                f"{path!r} is {a[path].dtype} {a[path].shape} in the first, {b[path].dtype} "
                f"{b[path].shape} in the second"
            )


def _batches(tensors: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Yield the tensors in groups of neighbours, so that small ones are not read one by one."""
    batch: list[TensorSpec] = []
    elements = 0
    for tensor in tensors:
        batch.append(tensor)
        elements += tensor.end - tensor.begin
        if elements >= _BATCH:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def _read(
    directory: DirectoryLike, manifest: Manifest, tensors: Sequence[TensorSpec]
) -> dict[tuple[str, str], Array]:
    """Return the arrays of some tensors, by (path, array).

    Read is the smallest range of each dtype space that holds them all.
    """
    ranges = dict.fromkeys(manifest.files[0].ranges, (0, 0))
    for tensor in tensors:
        begin, end = ranges[tensor.space]
        ranges[tensor.space] = (
            (tensor.begin, tensor.end)
            if begin == end
            else (min(begin, tensor.begin), max(end, tensor.end))
        )
    state = read_shard(directory, manifest, ranges=ranges)

    def cut(tensor: TensorSpec, name: str) -> Array:
        first = ranges[tensor.space][0]
        return state[name][tensor.space][tensor.begin - first : tensor.end - first].reshape(
            tensor.shape
        )

    return {(tensor.path, name): cut(tensor, name) for tensor in tensors for name in state}


def _values(path: str, array: str, a: Array, b: Array) -> TensorDiff | None:
    """Return how two arrays of one shape and dtype differ, or None if all bits are equal."""
    kind = np.dtype(f"u{a.itemsize}")
    wrong = a.view(kind) != b.view(kind)
    count = int(np.count_nonzero(wrong))
    if count == 0:
        return None
    bits = _ordered(a[wrong]), _ordered(b[wrong])
    with own_errors():
        largest = float(np.abs(a[wrong].astype(np.float64) - b[wrong].astype(np.float64)).max())
    ulps = np.where(bits[0] > bits[1], bits[0] - bits[1], bits[1] - bits[0])
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), a.shape))
    return TensorDiff(
        path=path,
        array=array,
        count=count,
        elements=a.size,
        max_abs=largest if np.isfinite(largest) else None,
        max_ulp=int(ulps.max()),
        first_index=index,
        first=(float(a[index]), float(b[index])),
    )


def _ordered(values: Array) -> Array:
    """Map floats to unsigned integers in the same order, representable neighbours one apart."""
    kind = np.dtype(f"u{values.itemsize}")
    bits, sign = values.view(kind), kind.type(1 << (8 * values.itemsize - 1))
    return np.where(bits & sign != 0, ~bits, bits | sign)
