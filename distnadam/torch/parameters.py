"""The model's own tensors, and which of them were changed since the shards' last values were
written into them. No shards.

What a step has left in a tensor is compared bit by bit, since torch counts no write through
`.data`.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch

from distnadam.torch.arrays import as_torch, bits_of, digest_bytes, digest_of

_SHOWN = 4


class Parameters:
    """Tensors by name, updated in place.

    Args:
        names: one for each tensor.
        tensors: the model's, each once.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        self._trees: list[tuple[Any, list[torch.Tensor], list[torch.Tensor]]] = []
        self._handed: list[torch.Tensor] | None = None  # as integers
        self._own: list[torch.Tensor] = []  # the tensors as integers
        self._places: list[int] = []

    def as_tree(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, as `build` takes them."""
        return {
            name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)
        }

    def changed(self) -> list[int]:
        """Return the tensors whose bits are not those that the last `take` has left."""
        if self._handed is None:
            return []
        places = [tensor.data_ptr() for tensor in self.tensors]
        if places != self._places:  # some have other memory, by `.data = ` or `module.to`
            self._look_at(places)
        equal = torch.equal
        return [
            index
            for index, (own, handed) in enumerate(zip(self._own, self._handed, strict=True))
            if not equal(own, handed)
        ]

    def in_words(self, changed: Sequence[int]) -> str:
        """Return changed tensors by name, each with a digest of its bits, for the other ranks."""
        each = [f"{self.names[i]!r} ({digest_of(self.tensors[i])})" for i in changed]
        shown = ", ".join(each[:_SHOWN])
        if len(each) <= _SHOWN:
            return shown
        rest = digest_bytes("".join(each[_SHOWN:]).encode())
        return f"{shown} and {len(each) - _SHOWN} more ({rest})"

    def take(self, tree: dict[str, Any]) -> None:
        """Write the shards' parameters into the tensors, in place.

        Args:
            tree: by name; the arrays must stay as they are until the next call.
        """
        values = self.hand_out(tree)
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, values)

    def hand_out(self, tree: dict[str, Any]) -> list[torch.Tensor]:
        """Take the shards' parameters to be what the tensors hold already; return them in order."""
        values, self._handed = self._of(tree)
        if not self._places:
            self._look_at([tensor.data_ptr() for tensor in self.tensors])
        return values

    def _of(self, tree: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return a tree as tensors in order, and as integers; a worker alternates between two."""
        arrays = [tree[name] for name in self.names]
        for known, values, bits in self._trees:
            if all(map(is_, known, arrays)):
                return values, bits
        values = [
            as_torch(array).to(tensor.device, tensor.dtype)
            for array, tensor in zip(arrays, self.tensors, strict=True)
        ]
        bits = [bits_of(value) for value in values]
        if all(tensor.device.type == "cpu" for tensor in self.tensors):
            self._trees = [*self._trees[-1:], (arrays, values, bits)]
        return values, bits

    def _look_at(self, places: list[int]) -> None:
        self._places = places
        self._own = [bits_of(tensor) for tensor in self.tensors]
