"""A shard's arrays: two buffers of parameters that alternate, the two moments, and where it is kept
the average of the parameters; and the master of what the buffers hold rounded. Pure; knows ranges,
not rounds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distnadam.tensors.arrays import STATE_ARRAYS, Copies, Dtypes, Flat, round_into, zeros_flat
from distnadam.tensors.layout import Layout, Range, Ranges, sizes_of


@dataclass
class ShardState:
    """The arrays of one shard's ranges.

    A step reads the current parameters and writes the spare buffer, which then becomes current, or
    writes them where they are if nobody sees them, or whoever does expects it. In
    a space that workers see rounded, the parameters are the master's, which a step changes in place
    as it does the moments, and the buffers hold them rounded.

    Once it is kept twice, a step reads all arrays of the current index and writes those of the
    other, so that whoever maps both finds the last round's whole, whenever this process dies.

    Attributes:
        buffers: the two buffers of parameters that workers see.
        m: the first moments.
        v: the second moments.
        masters: the parameters of the spaces that workers see rounded.
        ema: the average of the parameters; None if none is kept.
        frozen: by space, the stretches [first, last) that no step changes; their average is what
            they are.
        in_place: whether whoever sees the parameters expects steps and writes where they are; not
            of a state that is kept twice.
        active: the index of the current buffer.
        copies: by that index, the arrays beside the parameters by name, `masters` among them; None
            unless the state is kept twice.
        written: how often arrays were replaced other than by a step.
    """

    buffers: tuple[Flat, Flat]
    m: Flat
    v: Flat
    masters: Flat = field(default_factory=dict)
    ema: Flat | None = None
    frozen: Mapping[str, Sequence[Range]] = field(default_factory=dict)
    in_place: bool = field(default=False, init=False)
    active: int = field(default=0, init=False)
    copies: Copies | None = field(default=None, init=False)
    written: int = field(default=0, init=False)

    @classmethod
    def empty(
        cls,
        ranges: Ranges,
        buffers: tuple[Flat, Flat] | None = None,
        dtypes: Dtypes | None = None,
        *,
        arrays: Collection[str] = STATE_ARRAYS,
        frozen: Mapping[str, Sequence[Range]] | None = None,
    ) -> "ShardState":
        """Return zeroed state.

        Args:
            ranges: the shard's.
            buffers: the parameter buffers where the process shares them; None for new ones.
            dtypes: in which workers see the parameters of each space; None for the spaces' own.
            arrays: the names of what is kept, as `NadamConfig.state_arrays` has them.
            frozen: what `frozen_in` says of the ranges; None for nothing.
        """
        sizes = sizes_of(ranges)
        if buffers is None:
            buffers = zeros_flat(sizes, dtypes), zeros_flat(sizes, dtypes)
        rounded = {space: n for space, n in sizes.items() if dtypes and dtypes[space] != space}
        return cls(
            buffers,
            zeros_flat(sizes),
            zeros_flat(sizes),
            zeros_flat(rounded),
            zeros_flat(sizes) if "ema" in arrays else None,
            frozen or {},
        )

    @property
    def params(self) -> Flat:
        """The current parameters, as a step reads them."""
        return self.seen | self.masters

    @property
    def seen(self) -> Flat:
        """The current parameters, as workers see them."""
        return self.buffers[self.active]

    @property
    def spare(self) -> Flat:
        """Where the next parameters go; it holds those before the last step that went here."""
        return self.buffers[1 - self.active]

    def swap(self) -> None:
        """Make the spare buffer the current one."""
        self.active = 1 - self.active
        if self.copies is not None:
            self._take(self.copies[self.active])

    def keep_twice(self, copies: Copies) -> None:
        """Keep all arrays twice, in this memory, from now on.

        Args:
            copies: for each buffer the arrays by name, to be filled; a space of `masters` that is
                not rounded is not used.
        """
        for twin in copies:
            for name, flat in self._beside().items():
                for space, values in flat.items():
                    np.copyto(twin[name][space], values)
        self.copies = copies
        self.written += 1
        self._take(copies[self.active])

    def _take(self, now: Mapping[str, Flat]) -> None:
        """Take these of the copies for the present arrays."""
        self.m, self.v, self.ema = now["m"], now["v"], now.get("ema")
        self.masters = {space: now["masters"][space] for space in self.masters}

    def _beside(self) -> dict[str, Flat]:
        """Return the arrays that are kept beside the buffers, by name."""
        found = {"m": self.m, "v": self.v}
        if self.ema is not None:
            found["ema"] = self.ema
        return found | {"masters": self.masters} if self.masters else found

    def move(self) -> None:
        """Have the parameters in the spare buffer, and leave the current one as it is."""
        for space, values in self.spare.items():
            np.copyto(values, self.seen[space])
        self.swap()
        self.written += 1

    def arrays(self) -> dict[str, Flat]:
        """Return the present arrays by name."""
        found = {"params": self.params, "m": self.m, "v": self.v}
        return found if self.ema is None else found | {"ema": self.ema}

    def reset(self) -> dict[str, Flat]:
        """Return the arrays by name, to be filled in place before `settle`; workers see
        `buffers[0]` from now on, unless they see the parameters change in place.
        """
        if self.active != 0 and not self.in_place:
            self.swap()
        self.written += 1
        return self.arrays()

    def settle(self, *, begin_average: bool) -> None:
        """Have what follows from the parameters follow them, once these were filled: what workers
        see rounded, and the average, of what is frozen only unless it is to begin.
        """
        for space, master in self.masters.items():
            round_into(self.seen[space], master)
        self._settle_average(begin=begin_average)

    def _settle_average(self, *, begin: bool) -> None:
        params = self.params
        for space, average in (self.ema or {}).items():
            for first, last in [(0, average.size)] if begin else self.frozen.get(space, ()):
                np.copyto(average[first:last], params[space][first:last])

    def load(self, arrays: dict[str, Flat], active: int = 0) -> None:
        """Take whole arrays by name, moments that are not given being zero, and an average that is
        not the parameters; workers see `buffers[active]` from now on.
        """
        if self.active != active:
            self.swap()
        self.written += 1
        for name, target in self.arrays().items():
            for space, values in target.items():
                np.copyto(values, arrays[name][space] if name in arrays else 0)
        self.settle(begin_average="ema" not in arrays)

    def write(self, state: dict[str, Flat]) -> None:
        """Replace whole arrays by name; workers that see the present parameters keep them, unless
        they see them change in place, and so does who maps a state that is kept twice.
        """
        self.written += 1
        if self.copies is not None:
            before = self.arrays()
            self.swap()
            for name, target in self.arrays().items():
                for space, values in (before[name] | state.get(name, {})).items():
                    np.copyto(target[space], values)
            self.settle(begin_average=False)
            return
        following = self.seen if self.in_place else self.spare
        for name, flat in state.items():
            target = following | self.masters if name == "params" else self.arrays()[name]
            for space, values in flat.items():
                np.copyto(target[space], values)
        if "params" in state:
            if not self.in_place:
                self.swap()
            self.settle(begin_average=False)
        elif "ema" in state:
            self._settle_average(begin=False)


def stretches_of(layout: Layout, ranges: Ranges) -> dict[int, tuple[str, int, int]]:
    """Return for each tensor that lies in a shard's ranges its space, and the stretch [first, last)
    there that it takes, counted from where the range begins.
    """
    return {
        segment.tensor: (space, segment.begin - begin, segment.end - begin)
        for space, (begin, end) in ranges.items()
        for segment in layout.segments(space, begin, end)
    }


def frozen_in(layout: Layout, ranges: Ranges) -> dict[str, list[Range]]:
    """Return by space the stretches of a shard's ranges that no step changes, in order."""
    frozen: dict[str, list[Range]] = {space: [] for space in ranges} if layout.frozen else {}
    for tensor, (space, first, last) in stretches_of(layout, ranges).items():
        if tensor in layout.frozen:
            frozen[space].append((first, last))
    return frozen
