"""A shard's arrays: two buffers of parameters that alternate, and the two moments; and the master
of what the buffers hold rounded. Pure; knows ranges, not rounds.
"""

from dataclasses import dataclass, field

import numpy as np

from distnadam.tensors.arrays import Dtypes, Flat, round_into, zeros_flat
from distnadam.tensors.layout import Ranges, sizes_of


@dataclass
class ShardState:
    """The arrays of one shard's ranges.

    A step reads the current parameters and writes the spare buffer, which then becomes current, or
    writes them where they are if nobody sees them. In
    a space that workers see rounded, the parameters are the master's, which a step changes in place
    as it does the moments, and the buffers hold them rounded.

    Attributes:
        buffers: the two buffers of parameters that workers see.
        m: the first moments.
        v: the second moments.
        masters: the parameters of the spaces that workers see rounded.
        active: the index of the current buffer.
        written: how often arrays were replaced other than by a step.
    """

    buffers: tuple[Flat, Flat]
    m: Flat
    v: Flat
    masters: Flat = field(default_factory=dict)
    active: int = field(default=0, init=False)
    written: int = field(default=0, init=False)

    @classmethod
    def empty(
        cls,
        ranges: Ranges,
        buffers: tuple[Flat, Flat] | None = None,
        dtypes: Dtypes | None = None,
    ) -> "ShardState":
        """Return zeroed state.

        Args:
            ranges: the shard's.
            buffers: the parameter buffers where the process shares them; None for new ones.
            dtypes: in which workers see the parameters of each space; None for the spaces' own.
        """
        sizes = sizes_of(ranges)
        if buffers is None:
            buffers = zeros_flat(sizes, dtypes), zeros_flat(sizes, dtypes)
        rounded = {space: n for space, n in sizes.items() if dtypes and dtypes[space] != space}
        return cls(buffers, zeros_flat(sizes), zeros_flat(sizes), zeros_flat(rounded))

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

    def arrays(self) -> dict[str, Flat]:
        """Return the present arrays by name."""
        return {"params": self.params, "m": self.m, "v": self.v}

    def reset(self) -> dict[str, Flat]:
        """Return the arrays by name, to be filled in place before `round`; workers see
        `buffers[0]` from now on.
        """
        self.active = 0
        self.written += 1
        return self.arrays()

    def round(self) -> None:
        """Have workers see in the current buffer what the masters are now."""
        for space, master in self.masters.items():
            round_into(self.seen[space], master)

    def load(self, arrays: dict[str, Flat], active: int = 0) -> None:
        """Take whole arrays by name, those not given being zero; workers see `buffers[active]` from
        now on.
        """
        self.active = active
        self.written += 1
        for name, target in self.arrays().items():
            for space, values in target.items():
                np.copyto(values, arrays[name][space] if name in arrays else 0)
        self.round()

    def write(self, state: dict[str, Flat]) -> None:
        """Replace whole arrays by name; workers that see the present parameters keep them."""
        self.written += 1
        for name, flat in state.items():
            target = self.spare | self.masters if name == "params" else self.arrays()[name]
            for space, values in flat.items():
                np.copyto(target[space], values)
        if "params" in state:
            self.swap()
            self.round()
