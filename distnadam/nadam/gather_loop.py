"""The copy of many arrays into one in LLVM's instructions, and its compilation.

Imported only by a process that finds no compiled code on disk (`gather` loads it).
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from distnadam.nadam import gather_abi as abi
from distnadam.nadam.instructions import (
    BYTE,
    INDEX,
    POINTER,
    WORD,
    Instructions,
    machine_code,
    vector,
)

_AHEAD = 8
"""Arrays between the one that is read and the one that is fetched into the cache meanwhile."""
_VECTORS = 4
"""Vectors at a time: the sum of one awaits the last."""
_SHORT_LANES = 4
"""Elements at a time of what is left behind these: most arrays here are short."""


def compile_gather(dtype: str) -> bytes:
    """Return the copy for a dtype as an object file that defines the function `ENTRY`."""
    return machine_code(_Gather(dtype))


class _Gather(Instructions):
    """Writes the instructions for one dtype into `module`.

    Each leaf is compared with what it is to be, type first, since of another type nothing else is
    known; then its elements are copied, and their squares summed, in as many sums as are quick.
    """

    def __init__(self, dtype: str) -> None:
        kinds = [INDEX, INDEX, *[POINTER] * 4]
        super().__init__(dtype, abi.ENTRY, kinds, INDEX)
        first, last, self._shapes, self._target, expected, leaves = self.arguments
        code = self.code
        self._expected = [self.load(INDEX, expected, INDEX(k)) for k in range(abi.EXPECTED)]
        self._items = self._field(leaves, abi.LIST_ITEMS, POINTER)
        self._last = last
        behind = code.icmp_signed("<", self._field(leaves, abi.LIST_SIZE, INDEX), last)
        with code.if_then(behind, likely=False):
            code.ret(INDEX(abi.OTHER))
        self._widths = (_VECTORS * self.lanes, _SHORT_LANES, 1)
        zeros = [vector(self.element, lanes)(None) for lanes in self._widths]
        _, _, *sums = self.loop(first, last, self._leaf, [INDEX(0), INDEX(0), *zeros])
        total = sums[-1]
        for value, lanes in zip(sums[:-1], self._widths, strict=False):
            total = code.fadd(total, self._total(value, lanes))
        nothing = code.fsub(total, total)  # NaN where the sum is not finite
        is_finite = code.fcmp_ordered("ord", nothing, nothing)
        code.ret(code.select(is_finite, INDEX(abi.COPIED), INDEX(abi.LARGE)))

    def _total(self, value: Any, lanes: int) -> Any:
        """Return the sum of a vector's elements, halved until one is left."""
        code = self.code
        while lanes > 1:
            lanes //= 2
            low, high = (
                code.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(WORD, lanes), [*range(k, k + lanes)])
                )
                for k in (0, lanes)
            )
            value = code.fadd(low, high)
        return code.extract_element(value, WORD(0))

    def _field(self, of: Any, at: int, kind: Any) -> Any:
        return self.code.load(
            self.at(of, INDEX(at), BYTE), typ=kind, align=4 if kind is WORD else 8
        )

    def _leaf(self, i: Any, shape: Any, begin: Any, *sums: Any) -> Sequence[Any]:
        """Copy leaf i, whose shape is told at `shape`, to the elements from `begin` on."""
        code = self.code
        later = code.add(i, INDEX(_AHEAD))
        later = code.select(code.icmp_signed("<", later, self._last), later, i)
        array = self.load(POINTER, self._items, later)
        self.fetch(array, 0)
        self.fetch(array, abi.FLAGS)
        array = self.load(POINTER, self._items, i)
        type_, descr = self._expected
        self._require(self._field(array, abi.TYPE, INDEX), type_)
        self._require(self._field(array, abi.DESCR, INDEX), descr)
        flags = code.and_(self._field(array, abi.FLAGS, WORD), WORD(abi.READABLE))
        self._require(flags, WORD(abi.READABLE))
        number = code.sext(self._field(array, abi.DIMENSIONS, WORD), INDEX)
        self._require(number, self.load(INDEX, self._shapes, shape))
        found = self._field(array, abi.SHAPE, POINTER)
        shape = code.add(shape, INDEX(1))

        def dimension(k: Any, count: Any) -> Sequence[Any]:
            size = self.load(INDEX, found, k)
            self._require(size, self.load(INDEX, self._shapes, code.add(shape, k)))
            return [code.mul(count, size)]

        (count,) = self.loop(INDEX(0), number, dimension, [INDEX(1)])
        data = self._field(array, abi.DATA, POINTER)
        low: Any = INDEX(0)
        new: list[Any] = []
        for lanes, total in zip(self._widths, sums, strict=True):
            whole = code.and_(count, INDEX(-lanes))
            new += self._copy(data, begin, low, whole, lanes, total)
            low = whole
        return code.add(shape, number), code.add(begin, count), *new

    def _copy(
        self, data: Any, begin: Any, low: Any, high: Any, lanes: int, total: Any
    ) -> Sequence[Any]:
        """Copy elements [low, high) of an array, so many at a time; add their squares to a sum."""
        code, kind = self.code, vector(self.element, lanes)

        def copy(k: Any, total: Any) -> Sequence[Any]:
            value = self.load(kind, data, k)
            target = self.at(self._target, code.add(begin, k), self.element)
            code.store(value, target, align=self.size)
            return [code.fadd(total, code.fmul(value, value))]

        return self.loop(low, high, copy, [total], by=lanes)

    def _require(self, found: Any, expected: Any) -> None:
        """Return from the function unless two numbers are the same."""
        code = self.code
        with code.if_then(code.icmp_signed("!=", found, expected), likely=False):
            code.ret(ir.Constant(INDEX, abi.OTHER))
