"""A rank's gradients: flat memory that they are copied or written into, and checked to be finite.

No shards, no Ray.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, cast

import numpy as np

from distnadam.client.gradient_runs import (
    BLOCK,
    Run,
    copied_apart,
    large_in,
    narrow_in,
    not_finite,
    runs_of,
    trained_stretches,
)
from distnadam.client.micro_batches import add_micro_batch, divide, unscale
from distnadam.client.plain_gradients import PlainGradients
from distnadam.errors import ConfigError, LifecycleError, StructureError
from distnadam.nadam.parts import NONE_ABSENT
from distnadam.tensors.arrays import HALF, NAME_OF, Array, Flat, cut_flat, dtype_of, own_errors
from distnadam.tensors.layout import Layout, Ranges, TensorSpec
from distnadam.tensors.pieces import Pieces, concatenate

_Views = tuple[Flat, list[Array], list[tuple[Run, Array]]]
"""Flat arrays, a view of each tensor's, and of each run's."""


class GradientBuffer:
    """One rank's gradients, reused at every step.

    Each space lies in its own dtype, or, where all its gradients come in one half precision, in
    that, from the beginning of the same memory: half the bytes, and the same bits, since widening
    is exact.

    Args:
        layout: the model's layout.
        who: begins each error's sentence, such as "worker 1".
        memory: one flat array per space.
        check: whether gradients are checked to be finite.
        compiled: whether they may be copied by compiled code.

    Attributes:
        is_lent: whether it has borrowed gradients.
        loss_scale: what gradients are divided by before they are judged; 0: by nothing.
        micro_steps: of how many micro-batches the memory holds the sum.
        absent: the tensors that have no gradient, and zeros in the memory; frozen ones apart.
    """

    def __init__(
        self, layout: Layout, who: str, memory: Flat, *, check: bool = True, compiled: bool = True
    ) -> None:
        self._layout = layout
        self._who = who
        self._what = f"{who}: gradients"
        self._memory = memory
        self._check = check
        self._by_dtypes: dict[tuple[str, ...], _Views] = {}
        # of the leaves of the last tree, while the memory is laid out for it
        self._found: tuple[list[np.dtype[Any]], frozenset[int]] = ([], frozenset())
        self._parts: tuple[Flat, list[Ranges], list[Flat]] | None = None
        self._written: set[int] = set()
        self._lent: dict[int, Array] = {}  # by tensor, while they are borrowed
        self._pieces: dict[str, Pieces] = {}
        self.is_lent = False
        self.micro_steps = 0
        self.absent = NONE_ABSENT
        self.loss_scale = 0.0
        self._view_dtypes: dict[str, str] | None = None
        self._narrow, self._large = narrow_in(layout), large_in(layout)
        self._looked_at = trained_stretches(layout)
        self._trained = sum(b - a for each in self._looked_at.values() for a, b in each)
        self._runs = runs_of(layout)
        self._plain = PlainGradients(layout, memory) if compiled else None
        self._rejection: str | None = None
        self._index = {tensor.path: index for index, tensor in enumerate(layout.tensors)}
        self._select({})

    def fill(self, gradients: Any) -> str | None:
        """Copy a tree of gradients; return why they cannot be used, naming a tensor, or None.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's.
            LifecycleError: micro-batches were accumulated.
        """
        if self.micro_steps or self.is_lent:
            self._forget_last()
        # what `write` and views have brought stays as it is until the tree is known to be right
        is_alone = not (self._written or self.loss_scale or self.has_views)
        doubtful = self._plain.copy(gradients) if self._plain and is_alone else None
        if doubtful is None:
            return self._fill_any(gradients)
        if not self._is_whole:
            self._select({})
        self.absent = NONE_ABSENT
        return self._search(doubtful) if doubtful else None

    def _fill_any(self, gradients: Any) -> str | None:
        leaves, self.absent = self._layout.gradients(gradients, what=self._what)
        if (found := ([leaf.dtype for leaf in leaves], self.absent)) != self._found:
            self._select(self._common_half(*found))
            self._found = found
        self._written.clear()
        self._rejection = None
        leaves = copied_apart(self._memory, leaves, self._views) if self.has_views else leaves
        with own_errors():
            for run, values in self._targets:
                if run.is_large:
                    self._copy(self._layout.tensors[run.first], leaves[run.first])
                    continue
                if run.last == run.first + 1 or self.has_views:  # of which the leaves may be
                    for index in range(run.first, run.last):
                        if leaves[index] is not self._views[index]:
                            np.copyto(self._views[index], leaves[index], casting="unsafe")
                else:
                    concatenate(leaves[run.first : run.last], values)
                if self.loss_scale or not (self._is_whole and math.isfinite(values.dot(values))):
                    self._judge(run.space, values, run.begin)
        return self._rejection

    def borrow(self, gradients: Any, apart_from: Sequence[Array]) -> str | None:
        """Check a tree of gradients; return why they cannot be used, or None.

        Large tensors that are contiguous and of their space's dtype stay where they lie, if they
        are most of the model; all others are copied. So they must stay as they are until `keep`
        copies them, or `release` says that no shard reads them any more.

        Args:
            gradients: as `fill` takes them.
            apart_from: memory that a step writes; what may overlap it is copied.

        Raises:
            StructureError, LifecycleError: as `fill`.
        """
        if not self._large or self.has_views or self.micro_steps or self.loss_scale:
            return self.fill(gradients)
        leaves, absent = self._layout.gradients(gradients, what=self._what)
        lent = {
            index: leaf.reshape(-1)
            for index, tensor in self._large
            if (leaf := leaves[index]).dtype == tensor.space
            and leaf.flags.c_contiguous
            and leaf.flags.aligned
            and not any(np.may_share_memory(leaf, memory) for memory in apart_from)
        }
        if 2 * sum(map(np.size, lent.values())) < self._trained:
            given = [None if i in absent else leaf for i, leaf in enumerate(leaves)]
            return self.fill(self._layout.unflatten(given))
        self._select({})
        self.absent = absent
        self._written.clear()
        self._rejection = None
        wholes: dict[str, list[Array]] = {space: [] for space in self.flat}
        copied = dict.fromkeys(self.flat, 0)  # where the elements begin that are copied together
        with own_errors():
            for index, (tensor, leaf) in enumerate(zip(self._layout.tensors, leaves, strict=True)):
                if index not in lent:
                    if index not in self._layout.frozen:
                        np.copyto(self._views[index], leaf, casting="same_kind")
                    continue
                begin = copied[tensor.space]
                between = self.flat[tensor.space][begin : tensor.begin]
                self._judge_written(tensor.space, begin, tensor.begin)
                self._judge(tensor.space, lent[index], tensor.begin)
                wholes[tensor.space] += [between, lent[index]]
                copied[tensor.space] = tensor.end
            for space, arrays in wholes.items():
                arrays.append(self.flat[space][copied[space] :])
                self._judge_written(space, copied[space], self._layout.sizes[space])
        self._lent, self.is_lent = lent, True
        self._pieces = {space: Pieces(arrays) for space, arrays in wholes.items()}
        return self._rejection

    def keep(self) -> None:
        """Copy what was borrowed, which its owner may change from now on."""
        for index, leaf in self._lent.items():
            np.copyto(self._views[index].reshape(-1), leaf)
        self.release()

    def _forget_last(self) -> None:
        if self.micro_steps:
            raise self._mixed("a whole gradient was given")
        self.release()

    def release(self) -> None:
        """Forget what was borrowed."""
        self._lent, self._pieces, self.is_lent = {}, {}, False

    def accumulate(self, gradients: Any) -> None:
        """Add a micro-batch's gradients, as `fill` takes them; `finish` divides the sum.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's.
            LifecycleError: the round is written otherwise.
        """
        if self._written or self.has_views:
            what = "tensors were pushed for it" if self._written else "gradients() has given views"
            raise LifecycleError(
                f"{self._who}: accumulate needs the memory of a round for itself, and {what}"
            )
        leaves, absent = self._layout.gradients(gradients, what=self._what)
        if not self.micro_steps:
            self._select({})
        self.absent = self.absent & absent if self.micro_steps else absent
        add_micro_batch(self._layout, self.flat, leaves, is_first=not self.micro_steps)
        self.micro_steps += 1

    def discard(self) -> None:
        """Forget the micro-batches."""
        self.micro_steps = 0

    def overflowed(self) -> str:
        """Forget what came for the round, which overflowed; return why it cannot be used."""
        self.discard()
        self.absent = frozenset()
        self._written.clear()
        return f"{self._who}: its gradients overflowed (found_inf)"

    @property
    def has_views(self) -> bool:
        """Whether somebody may write into the memory at any time."""
        return self._view_dtypes is not None

    def write(self, path: str, gradient: Any) -> TensorSpec:
        """Copy one tensor's gradient, as the backward pass yields it; those that have none by
        `finish` are absent, where the layout allows it.

        Returns:
            Where it lies.

        Raises:
            StructureError: the model has no such tensor, it is frozen, it came twice, or its shape
                or dtype is not the model's.
            LifecycleError: micro-batches were accumulated.
        """
        if self.micro_steps:
            raise self._mixed("a tensor was pushed")
        if path not in self._index:
            raise StructureError(
                f"{self._who}: {path!r} is not a tensor of the model; expected one of "
                f"{list(self._index)[:8]}"
            )
        index, tensor = self._index[path], self._layout.tensors[self._index[path]]
        if index in self._layout.frozen:
            raise StructureError(f"{self._who}: {path!r} is frozen, and takes no gradient")
        if index in self._written:
            raise StructureError(f"{self._who}: {path!r} was pushed already for this round")
        leaf = self._layout.checked(index, gradient, what=self._what)
        if not self._written:
            self._select({})
            self._rejection = None
        with own_errors():
            self._copy(tensor, leaf)
        self._written.add(index)
        return tensor

    def views(self, dtype: str | None) -> Any:
        """Return the memory as a tree of writable views, float32 in half precision if asked."""
        if dtype is not None and dtype not in (*HALF, "float32"):
            raise ConfigError(
                f"gradients: dtype must be None, 'float32', 'float16' or 'bfloat16', got {dtype!r}"
            )
        if dtype in HALF and self.loss_scale:
            raise ConfigError(
                f"gradients: views in {dtype} cannot hold what is divided by a loss scale; push "
                f"trees in {dtype}, or write views in float32"
            )
        if self.micro_steps:
            raise self._mixed("views were asked for")
        if dtype in HALF and self._written:
            raise LifecycleError(
                f"{self._who}: tensors that were pushed for this round lie in the memory in "
                f"float32; ask for views in {dtype} after the push"
            )
        self._view_dtypes = {"float32": dtype} if dtype in HALF else {}
        self._select(self._view_dtypes)
        return self._layout.unflatten(self._views)

    def finish(self) -> str | None:
        """Check what was written; return why it cannot be used, naming a tensor, or None.

        Raises:
            StructureError: some tensors were written by `write` and others not.
            LifecycleError: none was, and nobody has the views.
        """
        if self._written:
            missing = set(self._index.values()) - self._written - self._layout.frozen
            if refused := sorted(missing - self._layout.optional):
                raise StructureError(
                    f"{self._who}: gradients: {self._layout.tensors[refused[0]].path!r} was not "
                    f"pushed for this round ({len(refused)} missing)"
                )
            for index in missing:
                self._views[index][...] = 0
            self.absent = frozenset(missing)
            self._written.clear()
            return self._rejection
        if self.micro_steps:
            divide(self.flat, self._looked_at, self.micro_steps)
            self.micro_steps = 0
        elif self._view_dtypes is None:
            raise LifecycleError(
                f"{self._who}: give gradients, or write them into the views of gradients(), or "
                "push_tensor each, or accumulate micro-batches"
            )
        else:
            self._select(self._view_dtypes)
            self.absent = frozenset()
        doubtful = None
        if self._plain and self._is_whole and not self.loss_scale:
            doubtful = self._plain.look()
        return self._search(self._targets if doubtful is None else doubtful)

    def _search(self, doubtful: Sequence[tuple[Run, Array]]) -> str | None:
        """Check what lies in some runs; return why it cannot be used, or None."""
        self._rejection = None
        for run, values in doubtful:
            with own_errors():
                self._judge(run.space, values, run.begin)
        return self._rejection

    def _mixed(self, what: str) -> LifecycleError:
        """Return the refusal of gradients that come otherwise than the round's first."""
        return LifecycleError(
            f"{self._who}: {what}, and micro-batches were accumulated for this round "
            f"({self.micro_steps}): push() or step() without gradients sends their mean, discard() "
            "drops them"
        )

    def parts(self, ranges: list[Ranges]) -> list[Flat]:
        """Return each shard's ranges, in the dtypes that the gradients now lie in: views, or what
        is read by slices alone, as an array is.
        """
        if self.is_lent:
            cut = {space: pieces.cut for space, pieces in self._pieces.items()}
            return [
                {s: cast(Array, cut[s](begin, end)) for s, (begin, end) in each.items()}
                for each in ranges
            ]
        if self._parts is None or self._parts[0] is not self.flat or self._parts[1] is not ranges:
            self._parts = (self.flat, ranges, [cut_flat(self.flat, each) for each in ranges])
        return self._parts[2]

    def _select(self, halves: Mapping[str, str]) -> None:
        """Read the memory in these dtypes from now on."""
        self._found = ([], frozenset())
        key = tuple(halves.get(space, space) for space in self._memory)
        if key not in self._by_dtypes:
            flat = {
                s: m.view(dtype_of(name))[: m.size]
                for (s, m), name in zip(self._memory.items(), key, strict=True)
            }
            targets = [(run, flat[run.space][run.begin : run.end]) for run in self._runs]
            self._by_dtypes[key] = flat, self._layout.views(flat), targets
        self.flat, self._views, self._targets = self._by_dtypes[key]
        self._is_whole = all(space == name for space, name in zip(self._memory, key, strict=True))

    def _common_half(self, dtypes: list[np.dtype[Any]], absent: frozenset[int]) -> dict[str, str]:
        """Return the half precision of the float32 space, if all its gradients came in and stay."""
        narrow = {dtypes[index] for index in self._narrow if index not in absent}
        if len(narrow) != 1 or self.loss_scale:
            return {}
        name = NAME_OF[narrow.pop()]
        return {"float32": name} if name in HALF else {}

    def _copy(self, tensor: TensorSpec, leaf: Array) -> None:
        """Copy a tensor and check it, block by block."""
        source, target = leaf.reshape(-1), self.flat[tensor.space][tensor.begin : tensor.end]
        is_there = source.dtype == target.dtype and source.ctypes.data == target.ctypes.data
        for begin in range(0, source.size, BLOCK):
            piece = slice(begin, begin + BLOCK)
            if not is_there:  # as one of the views is
                np.copyto(target[piece], source[piece], casting="same_kind")
            self._judge(tensor.space, target[piece], tensor.begin + begin)

    def _judge_written(self, space: str, begin: int, end: int) -> None:
        """Check elements [begin, end) of the memory of a space, but those of frozen tensors."""
        stretches = self._looked_at[space]
        number = bisect_right(stretches, begin, key=itemgetter(1))
        while number < len(stretches) and (low := max(begin, stretches[number][0])) < end:
            high = min(end, stretches[number][1])
            self._judge(space, self.flat[space][low:high], low)
            number += 1

    def _judge(self, space: str, values: Array, begin: int) -> None:
        """Divide the space's elements from `begin` on by the loss scale, if any, and record the
        first that is not finite, or whose square overflows; the caller has both ignored.
        """
        if self.loss_scale:
            unscale(values, self.loss_scale)
        if self._rejection is None and self._check:
            why = not_finite(self._layout, space, values, begin)
            self._rejection = why and f"{self._who}: {why}"
