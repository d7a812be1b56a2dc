"""The fused step in LLVM's instructions, and its compilation for this machine's CPU.

Imported only by a process that finds no compiled loop on disk (`fused` loads it). Bit for bit what
`NumPyStepper` computes: the same operations in the same order, which LLVM neither contracts nor
reorders, since none is marked as fast; denormals kept. All of the step happens in one pass, a line
of the cache at a time: it takes the time of its bytes, of which roots and divisions need half.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from distnadam.nadam.fused_abi import ARGUMENTS, CONSTANTS, ENTRY, PART
from distnadam.nadam.instructions import (
    INDEX,
    LINE,
    POINTER,
    WORD,
    Instructions,
    machine_code,
    vector,
)
from distnadam.nadam.step_scalars import PER_SETTING

_AHEAD = 2048
"""Bytes between what is read and what is fetched meanwhile: the processor's own fetching ends with
each page of memory.
"""


def compile_loop(dtype: str, cpu: str | None = None) -> bytes:
    """Return the step for a dtype as an object file that defines the function `ENTRY`, for this
    machine's CPU or another one that LLVM knows by name.
    """
    return machine_code(_Step(dtype), cpu)


class _Number:
    """An element, or a vector of elements, with Python's operators."""

    def __init__(self, code: Any, value: Any) -> None:
        self.code = code
        self.value = value

    def __add__(self, other: "_Number") -> "_Number":
        return _Number(self.code, self.code.fadd(self.value, other.value))

    def __sub__(self, other: "_Number") -> "_Number":
        return _Number(self.code, self.code.fsub(self.value, other.value))

    def __mul__(self, other: "_Number") -> "_Number":
        return _Number(self.code, self.code.fmul(self.value, other.value))

    def __truediv__(self, other: "_Number") -> "_Number":
        return _Number(self.code, self.code.fdiv(self.value, other.value))

    def root(self) -> "_Number":
        """Return the square root, correctly rounded."""
        kind, module = self.value.type, self.code.module
        name = (
            kind.intrinsic_name
            if not isinstance(kind, ir.VectorType)
            else (f"v{kind.count}{kind.element.intrinsic_name}")
        )
        root = module.globals.get(f"llvm.sqrt.{name}") or ir.Function(
            module, ir.FunctionType(kind, [kind]), f"llvm.sqrt.{name}"
        )
        return _Number(self.code, self.code.call(root, [self.value]))

    def if_it_is(self, order: str, other: "_Number") -> "_Number":
        """Return this number where it is "<" or ">" than the other, else the other."""
        it_is = self.code.fcmp_ordered(order, self.value, other.value)
        return _Number(self.code, self.code.select(it_is, self.value, other.value))


class _Setting(NamedTuple):
    """A part's coefficients, as in `StepScalars`, then its scale; each may be NaN, for none."""

    gradient: Any
    momentum: Any
    epsilon: Any
    k_1: Any
    k_2: Any
    decay: Any
    l2: Any
    limit: Any
    scale: Any


class _Step(Instructions):
    """Writes the instructions for one dtype into `module`.

    What a step lacks is skipped by branches, which the processor foresees, since they go the same
    way for all elements of a part.
    """

    def __init__(self, dtype: str) -> None:
        kinds = [INDEX if kind is ARGUMENTS[0] else POINTER for kind in ARGUMENTS]
        super().__init__(dtype, ENTRY, kinds, ir.VoidType())
        self._groups, parts, streams, *addresses = self.arguments
        self._gradients, self._group_sizes, *addresses = addresses
        self._p, self._m, self._v, self._out, *addresses = addresses
        self._m_out, self._v_out, self._bounds, *addresses = addresses
        self._coefficients, count, self._scales, self._kept, self._rounded, constants = addresses
        code = self.code
        self._streams = code.icmp_signed("!=", streams, INDEX(0))
        self._keeps, self._rounds = (
            code.icmp_unsigned("!=", code.ptrtoint(address, INDEX), INDEX(0))
            for address in (self._kept, self._rounded)
        )
        self._count = self.load(self.element, count, INDEX(0))
        self._divides = code.fcmp_ordered("ord", self._count, self._count)
        self._constants = [self.load(WORD, constants, INDEX(k)) for k in range(len(CONSTANTS))]
        self.loop(INDEX(0), parts, self._part)
        with code.if_then(self._streams):
            code.fence("seq_cst")  # who is told of the step sees what went past the caches
        code.ret_void()

    def _part(self, part: Any) -> Sequence[Any]:
        """Step a part: lines of the written parameters, and what lies before and behind them."""
        code = self.code
        at = code.mul(part, INDEX(PART))
        begin, end, setting, scale = (
            self.load(INDEX, self._bounds, code.add(at, INDEX(k))) for k in range(PART)
        )
        at = code.mul(setting, INDEX(PER_SETTING))
        coefficients = [
            self.load(self.element, self._coefficients, code.add(at, INDEX(k)))
            for k in range(PER_SETTING)
        ]
        factor = self.load(self.element, self._scales, scale)
        numbers = _Setting._make([*coefficients, factor])
        has = _Setting(*(code.fcmp_ordered("ord", number, number) for number in numbers))
        address = code.ptrtoint(self.at(self._out, begin, self.element), INDEX)
        to_line = code.and_(code.sub(INDEX(0), address), INDEX(LINE - 1))
        first = code.add(begin, code.udiv(to_line, INDEX(self.size)))
        first = code.select(code.icmp_signed("<", first, end), first, end)
        last = code.add(first, code.and_(code.sub(end, first), INDEX(-self.lanes)))
        for low, high, lanes in ((begin, first, 1), (first, last, self.lanes), (last, end, 1)):
            self._elements(low, high, lanes, numbers, has)
        return ()

    def _elements(self, begin: Any, end: Any, lanes: int, numbers: Any, has: _Setting) -> None:
        """Step elements [begin, end), so many at a time."""
        code, kind = self.code, vector(self.element, lanes)
        numbers = _Setting(*(_Number(code, self.spread(n, lanes)) for n in numbers))
        count = _Number(code, self.spread(self._count, lanes))
        least = _Number(code, kind(None)) - numbers.limit

        def step(i: Any) -> Sequence[Any]:
            def read(array: Any) -> _Number:
                if lanes > 1:
                    self.fetch(self.at(array, i, self.element), _AHEAD)
                return _Number(code, self.load(kind, array, i))

            def write(number: _Number, array: Any) -> None:
                code.store(number.value, self.at(array, i, self.element), align=self.size)

            g = self._sum(read)
            g = self._where(self._divides, g, lambda: g / count)
            g = self._where(has.scale, g, lambda: g * numbers.scale)
            g = self._where(
                has.limit, g, lambda: g.if_it_is(">", least).if_it_is("<", numbers.limit)
            )
            with code.if_then(self._keeps):
                write(g, self._kept)
            p, m, v = read(self._p), read(self._m), read(self._v)
            g = self._where(has.l2, g, lambda: g + p * numbers.l2)
            moment = m + (g - m) * numbers.k_1
            square = v + (g * g - v) * numbers.k_2
            write(moment, self._m_out)
            write(square, self._v_out)
            along = moment * numbers.momentum
            along = self._where(has.gradient, along, lambda: g * numbers.gradient + along)
            less = along / (square.root() + numbers.epsilon)
            less = self._where(has.decay, less, lambda: p * numbers.decay + less)
            new = p - less
            if lanes == 1:
                write(new, self._out)
            else:
                self._write_line(new.value, self.at(self._out, i, self.element))
            if self.element == ir.FloatType():
                with code.if_then(self._rounds):
                    self._write_rounded(new.value, i, lanes)
            return ()

        self.loop(begin, end, step, by=lanes)

    def _sum(self, read: Callable[[Any], _Number]) -> _Number:
        """Return the sum of the groups' sums, each in order."""
        code = self.code

        def gradient(rank: Any) -> _Number:
            return read(self.load(POINTER, self._gradients, rank))

        def add_gradient(rank: Any, total: Any) -> Sequence[Any]:
            return [(_Number(code, total) + gradient(rank)).value]

        def sum_of(group: Any, first: Any) -> tuple[_Number, Any]:
            """Return a group's sum, and the first gradient of the next group."""
            end = code.add(first, self.load(INDEX, self._group_sizes, group))
            begun = [gradient(first).value]
            (total,) = self.loop(code.add(first, INDEX(1)), end, add_gradient, begun)
            return _Number(code, total), end

        def add_group(group: Any, total: Any, first: Any) -> Sequence[Any]:
            more, end = sum_of(group, first)
            return [(_Number(code, total) + more).value, end]

        total, end = sum_of(INDEX(0), INDEX(0))
        found, _ = self.loop(INDEX(1), self._groups, add_group, [total.value, end])
        return _Number(code, found)

    def _write_line(self, value: Any, address: Any) -> None:
        """Store a vector at the beginning of a line, past the caches if the step says so."""
        code = self.code
        with code.if_else(self._streams) as (past, into):
            with past:
                store = code.store(value, address, align=LINE)
                store.set_metadata("nontemporal", self.module.add_metadata([WORD(1)]))
            with into:
                code.store(value, address, align=LINE)

    def _write_rounded(self, new: Any, i: Any, lanes: int) -> None:
        """Store float32 values rounded to bfloat16, with the bits of `round_into`."""
        code, word, half = self.code, vector(WORD, lanes), vector(ir.IntType(16), lanes)
        one, below_half, sign, quiet = (self.spread(k, lanes) for k in self._constants)
        x = code.bitcast(new, word)
        high = code.lshr(x, ir.Constant(word, 16 if lanes == 1 else [16] * lanes))
        carried = code.add(code.add(x, below_half), code.and_(high, one))
        nearest = code.lshr(carried, ir.Constant(word, 16 if lanes == 1 else [16] * lanes))
        nan = code.or_(code.and_(high, sign), quiet)
        found = code.select(code.fcmp_unordered("uno", new, new), nan, nearest)
        address = self.at(self._rounded, i, ir.IntType(16))
        code.store(code.trunc(found, half), address, align=2)

    def _where(self, flag: Any, number: _Number, change: Callable[[], _Number]) -> _Number:
        """Return the changed number if the flag is set, else the number."""
        code = self.code
        before = code.block
        with code.if_then(flag):
            changed = change().value
            inside = code.block
        found = code.phi(changed.type)
        found.add_incoming(number.value, before)
        found.add_incoming(changed, inside)
        return _Number(code, found)
