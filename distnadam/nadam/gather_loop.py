"""The copy of a tree's arrays into flat memory in LLVM's instructions, and its compilation.

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

_AHEAD = 32
"""Arrays between the one that is read and the one whose shape and elements are fetched into the
cache meanwhile; as many ahead of that is the one that is fetched itself.
"""
_VECTORS = 4
"""Vectors at a time: the sum of one awaits the last."""
_SHORT_LANES = 4
"""Elements at a time of what is left behind these: most arrays here are short."""


def compile_gather(dtype: str) -> bytes:
    """Return the copy for a dtype as an object file that defines the function `ENTRY`."""
    return machine_code(_Gather(dtype))


class _Gather(Instructions):
    """Writes the instructions for one dtype into `module`.

    The tree is walked first, which finds its leaves. Each is compared with what it is to be, type
    first, since of another type nothing else is known; then its elements are copied, and their
    squares summed, in as many sums as are quick.
    """

    def __init__(self, dtype: str) -> None:
        kinds = [*[POINTER] * 3, INDEX, *[POINTER] * 3, INDEX, *[POINTER] * 2]
        super().__init__(dtype, abi.ENTRY, kinds, INDEX)
        tree, self._slots, self._containers, containers, *arguments = self.arguments
        self._keys, self._places, self._runs, runs, self._results, constants = arguments
        code = self.code
        next_, compare, *types, known = (
            self.load(INDEX, constants, INDEX(k)) for k in range(len(abi.CONSTANTS))
        )
        self._knows_dicts = code.icmp_signed("!=", known, INDEX(0))
        self._dict, self._list, self._str, self._array, self._dtype = types
        self._next = code.inttoptr(next_, ir.FunctionType(WORD, [POINTER] * 4).as_pointer())
        self._compare = code.inttoptr(compare, ir.FunctionType(WORD, [POINTER] * 2).as_pointer())
        self._position, self._key, self._value = map(code.alloca, (INDEX, POINTER, POINTER))
        self._widths = (_VECTORS * self.lanes, _SHORT_LANES, 1)
        code.store(tree, self._slots, align=8)
        (strange,) = self.loop(INDEX(0), containers, self._container, [INDEX(0)])
        (large,) = self.loop(INDEX(0), runs, self._run, [INDEX(0)])
        code.ret(code.or_(strange, large))

    # The tree

    def _container(self, i: Any, strange: Any) -> Sequence[Any]:
        """Put the children of container i into their slots."""
        code = self.code
        slot, kind, count, first = self._numbers(self._containers, i, abi.CONTAINER)
        found = self.load(POINTER, self._slots, slot)
        self._require(self._field(found, abi.TYPE, INDEX), kind, abi.CONTAINERS)
        with code.if_else(code.icmp_signed("==", kind, self._dict)) as (is_dict, is_sequence):
            with is_dict:
                now = self._dict_items(found, first, count, strange)
                behind_dict = code.block
            with is_sequence:
                self._sequence_items(found, kind, first, count)
                behind_sequence = code.block
        return [self._phi((now, behind_dict), (strange, behind_sequence))]

    def _dict_items(self, found: Any, first: Any, count: Any, strange: Any) -> Any:
        """Put a dict's values into their slots, if its keys are those that are known."""
        code = self.code
        self._require(self._field(found, abi.SIZE, INDEX), count, abi.CONTAINERS)
        before, table = code.block, self._field(found, abi.KEYS, POINTER)
        with code.if_then(self._knows_dicts):
            apart = self._field(found, abi.VALUES, INDEX)
            odd = code.or_(apart, code.sub(self._field(table, abi.ENTRIES, INDEX), count))
            kind = code.sub(self._byte(table, abi.KIND), INDEX(abi.STRINGS))
            is_plain = code.icmp_signed("==", code.or_(odd, kind), INDEX(0))
            inside = code.block
        lies_open = self._phi((ir.Constant(ir.IntType(1), 0), before), (is_plain, inside))
        with code.if_else(lies_open) as (can_read, must_ask):
            with can_read:
                read = self._read_items(table, first, count, strange)
                behind_read = code.block
            with must_ask:
                asked = self._ask_for_items(found, first, count, strange)
                behind_asked = code.block
        return self._phi((read, behind_read), (asked, behind_asked))

    def _read_items(self, table: Any, first: Any, count: Any, strange: Any) -> Any:
        """Put the values of a dict's table into their slots, from where they lie."""
        code = self.code
        size = code.shl(INDEX(1), self._byte(table, abi.INDEX_BITS))
        entries = self.at(table, code.add(INDEX(abi.INDICES), size), BYTE)

        def put(k: Any, strange: Any) -> Sequence[Any]:
            at = code.shl(k, INDEX(1))
            key, value = (self.load(POINTER, entries, code.add(at, INDEX(i))) for i in range(2))
            return [self._put_item(code.add(first, k), key, value, strange)]

        (strange,) = self.loop(INDEX(0), count, put, [strange])
        return strange

    def _ask_for_items(self, found: Any, first: Any, count: Any, strange: Any) -> Any:
        """Put a dict's values into their slots, as the interpreter tells them."""
        code = self.code

        def put(k: Any, strange: Any) -> Sequence[Any]:
            self._require(self._go_on(found), WORD(1), abi.CONTAINERS)
            key, value = (
                code.load(each, typ=POINTER, align=8) for each in (self._key, self._value)
            )
            return [self._put_item(code.add(first, k), key, value, strange)]

        code.store(INDEX(0), self._position, align=8)
        (strange,) = self.loop(INDEX(0), count, put, [strange])
        return strange

    def _put_item(self, child: Any, key: Any, value: Any, strange: Any) -> Any:
        """Put a value into the slot of a child whose key is known, and return whether one was not
        the very object that is known.
        """
        code = self.code
        known = self.load(POINTER, self._keys, child)
        before = code.block
        is_other = code.icmp_unsigned("!=", code.ptrtoint(key, INDEX), code.ptrtoint(known, INDEX))
        with code.if_then(is_other, likely=False):
            for each in (key, known):  # of another type, it may run anything to compare itself
                self._require(self._field(each, abi.TYPE, INDEX), self._str, abi.CONTAINERS)
            self._require(code.call(self._compare, [key, known]), WORD(0), abi.CONTAINERS)
            inside = code.block
        now = self._phi((strange, before), (INDEX(abi.STRANGE), inside))
        self._put(child, value)
        return now

    def _go_on(self, found: Any) -> Any:
        """Go on to a dict's next item; return 1, or 0 where there is none."""
        return self.code.call(self._next, [found, self._position, self._key, self._value])

    def _sequence_items(self, found: Any, kind: Any, first: Any, count: Any) -> None:
        """Put a list's or a tuple's items into their slots."""
        code = self.code
        self._require(self._field(found, abi.SIZE, INDEX), count, abi.CONTAINERS)
        inside, before = self.at(found, INDEX(abi.ITEMS), BYTE), code.block
        with code.if_then(code.icmp_signed("==", kind, self._list)):
            outside, in_list = self._field(found, abi.ITEMS, POINTER), code.block
        items = self._phi((inside, before), (outside, in_list))

        def put(k: Any) -> Sequence[Any]:
            self._put(code.add(first, k), self.load(POINTER, items, k))
            return ()

        self.loop(INDEX(0), count, put)

    def _put(self, child: Any, value: Any) -> None:
        slot = self.load(INDEX, self._places, child)
        self.code.store(value, self.at(self._slots, slot, POINTER), align=8)

    # The leaves

    def _run(self, i: Any, large: Any) -> Sequence[Any]:
        """Copy the leaves of run i, and say whether the sum of their squares is finite."""
        code = self.code
        first, last, shapes, target = self._numbers(self._runs, i, abi.RUN)
        shapes, target = (code.inttoptr(each, POINTER) for each in (shapes, target))
        zeros = [vector(self.element, lanes)(None) for lanes in self._widths]

        def leaf(k: Any, *carried: Any) -> Sequence[Any]:
            return self._leaf(k, last, shapes, target, *carried)

        _, _, *sums = self.loop(first, last, leaf, [INDEX(0), INDEX(0), *zeros])
        total = sums[-1]
        for value, lanes in zip(sums[:-1], self._widths, strict=False):
            total = code.fadd(total, self._total(value, lanes))
        nothing = code.fsub(total, total)  # NaN where the sum is not finite
        is_finite = code.fcmp_ordered("ord", nothing, nothing)
        found = code.select(is_finite, INDEX(0), INDEX(abi.LARGE))
        code.store(found, self.at(self._results, i, INDEX), align=8)
        return [code.or_(large, found)]

    def _leaf(
        self, i: Any, last: Any, shapes: Any, target: Any, shape: Any, begin: Any, *sums: Any
    ) -> Sequence[Any]:
        """Copy the leaf in slot i, whose shape is told at `shape`, to the elements from `begin` on.

        `last` is the slot behind the run's.
        """
        code = self.code
        self._fetch_ahead(i, last)
        array = self.load(POINTER, self._slots, i)
        self._require(self._field(array, abi.TYPE, INDEX), self._array, abi.OTHER)
        self._require(self._field(array, abi.DESCR, INDEX), self._dtype, abi.OTHER)
        flags = code.and_(self._field(array, abi.FLAGS, WORD), WORD(abi.READABLE))
        self._require(flags, WORD(abi.READABLE), abi.OTHER)
        number = code.sext(self._field(array, abi.DIMENSIONS, WORD), INDEX)
        self._require(number, self.load(INDEX, shapes, shape), abi.OTHER)
        found = self._field(array, abi.SHAPE, POINTER)
        shape = code.add(shape, INDEX(1))

        def dimension(k: Any, count: Any) -> Sequence[Any]:
            size = self.load(INDEX, found, k)
            self._require(size, self.load(INDEX, shapes, code.add(shape, k)), abi.OTHER)
            return [code.mul(count, size)]

        (count,) = self.loop(INDEX(0), number, dimension, [INDEX(1)])
        data = self._field(array, abi.DATA, POINTER)
        low: Any = INDEX(0)
        new: list[Any] = []
        for lanes, total in zip(self._widths, sums, strict=True):
            whole = code.and_(count, INDEX(-lanes))
            new += self._copy(data, self.at(target, begin, self.element), low, whole, lanes, total)
            low = whole
        return code.add(shape, number), code.add(begin, count), *new

    def _fetch_ahead(self, i: Any, last: Any) -> None:
        """Fetch arrays that follow slot i's into the cache, and what nearer ones refer to."""
        code = self.code
        far, near = (
            self.load(
                POINTER,
                self._slots,
                code.select(code.icmp_signed("<", later, last), later, i),
            )
            for later in (code.add(i, INDEX(ahead)) for ahead in (2 * _AHEAD, _AHEAD))
        )
        self.fetch(far, 0)
        self.fetch(far, abi.FLAGS)
        is_array = code.icmp_signed("==", self._field(near, abi.TYPE, INDEX), self._array)
        with code.if_then(is_array, likely=True):
            self.fetch(self._field(near, abi.SHAPE, POINTER), 0)
            self.fetch(self._field(near, abi.DATA, POINTER), 0)

    def _copy(
        self, data: Any, target: Any, low: Any, high: Any, lanes: int, total: Any
    ) -> Sequence[Any]:
        """Copy elements [low, high) of an array, so many at a time; add their squares to a sum."""
        code, kind = self.code, vector(self.element, lanes)

        def copy(k: Any, total: Any) -> Sequence[Any]:
            value = self.load(kind, data, k)
            code.store(value, self.at(target, k, self.element), align=self.size)
            return [code.fadd(total, code.fmul(value, value))]

        return self.loop(low, high, copy, [total], by=lanes)

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

    # Both

    def _numbers(self, table: Any, i: Any, width: int) -> Sequence[Any]:
        """Load the numbers of entry i of a table."""
        code = self.code
        at = code.mul(i, INDEX(width))
        return [self.load(INDEX, table, code.add(at, INDEX(k))) for k in range(width)]

    def _field(self, of: Any, at: int, kind: Any) -> Any:
        return self.code.load(
            self.at(of, INDEX(at), BYTE), typ=kind, align=4 if kind is WORD else 8
        )

    def _byte(self, of: Any, at: int) -> Any:
        return self.code.zext(
            self.code.load(self.at(of, INDEX(at), BYTE), typ=BYTE, align=1), INDEX
        )

    def _phi(self, *values: tuple[Any, Any]) -> Any:
        """Return the value of the block that one came from."""
        found = self.code.phi(values[0][0].type)
        for value, block in values:
            found.add_incoming(value, block)
        return found

    def _require(self, found: Any, expected: Any, otherwise: int) -> None:
        """Return from the function unless two numbers are the same."""
        code = self.code
        with code.if_then(code.icmp_signed("!=", found, expected), likely=False):
            code.ret(ir.Constant(INDEX, otherwise))
