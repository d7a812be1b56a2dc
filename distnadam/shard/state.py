"""A shard's arrays: two buffers of parameters that alternate, and the two moments. Pure; knows
ranges, not rounds.
"""

from dataclasses import dataclass, field

import numpy as np

from distnadam.tensors.arrays import Flat, zeros_flat
from distnadam.tensors.layout import Ranges, sizes_of


@dataclass
class ShardState:
    """The arrays of one shard's ranges.

    A step reads the current parameters and writes the spare ones, which then become current.

    Attributes:
        buffers: the two buffers of parameters.
        m: the first moments.
        v: the second moments.
        active: the index of the current buffer.
    """

    buffers: tuple[Flat, Flat]
    m: Flat
    v: Flat
    active: int = field(default=0, init=False)

    @classmethod
    def empty(cls, ranges: Ranges, buffers: tuple[Flat, Flat] | None = None) -> "ShardState":
        """Return zeroed state, on the given parameter buffers where the process shares them."""
        sizes = sizes_of(ranges)
        return cls(
            buffers or (zeros_flat(sizes), zeros_flat(sizes)), zeros_flat(sizes), zeros_flat(sizes)
        )

    @property
    def params(self) -> Flat:
        """The current parameters."""
        return self.buffers[self.active]

    @property
    def spare(self) -> Flat:
        """Where the next parameters go; it holds those of the step before."""
        return self.buffers[1 - self.active]

    def swap(self) -> None:
        """Make the spare buffer the current one."""
        self.active = 1 - self.active

    def arrays(self) -> dict[str, Flat]:
        """Return the present arrays by name."""
        return {"params": self.params, "m": self.m, "v": self.v}

    def reset(self) -> dict[str, Flat]:
        """Return the arrays by name, to be filled in place; the present parameters are `buffers[0]`
        from now on.
        """
        self.active = 0
        return self.arrays()

    def load(self, arrays: dict[str, Flat], active: int = 0) -> None:
        """Take whole arrays by name, those not given being zero; the present parameters are
        `buffers[active]` from now on.
        """
        self.active = active
        for name, target in self.arrays().items():
            for space, values in target.items():
                np.copyto(values, arrays[name][space] if name in arrays else 0)

    def write(self, state: dict[str, Flat]) -> None:
        """Replace whole arrays by name; readers of the present parameters keep them."""
        for name, flat in state.items():
            target = self.spare if name == "params" else self.arrays()[name]
            for space, values in flat.items():
                np.copyto(target[space], values)
        if "params" in state:
            self.swap()
