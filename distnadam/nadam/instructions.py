"""LLVM's instructions, written by Python: loops, vectors, and what is read from memory.

Imported only by a process that compiles. What it writes is compiled by `machine_code`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir

from distnadam.nadam.object_code import host_machine

LINE = 64
"""Bytes of a vector; of a line of the cache, on most machines."""
INDEX, WORD, BYTE, POINTER = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.PointerType()


class Instructions:
    """The instructions of one function on arrays of one dtype, written into `module`.

    Args:
        dtype: float32 or float64.
        name: the function's.
        kinds: of its arguments.
        result: the type of what it returns.

    Attributes:
        element: the type of an element.
        size: its bytes.
        lanes: elements of a vector of `LINE` bytes.
        code: where instructions are written next.
        arguments: the function's.
    """

    def __init__(self, dtype: str, name: str, kinds: Sequence[Any], result: Any) -> None:
        self.element = ir.FloatType() if dtype == "float32" else ir.DoubleType()
        self.size = np.dtype(dtype).itemsize
        self.lanes = LINE // self.size
        self.module = ir.Module()
        function = ir.Function(self.module, ir.FunctionType(result, kinds), name)
        self.arguments = function.args
        self.code: Any = ir.IRBuilder(function.append_basic_block())

    def loop(
        self,
        begin: Any,
        end: Any,
        body: Callable[..., Sequence[Any]],
        carried: Sequence[Any] = (),
        by: int = 1,
    ) -> Sequence[Any]:
        """Write `body(i, *carried)` for each i, which returns what the next turn gets in place of
        `carried`; return what the last has left.
        """
        code = self.code
        before = code.block
        head, inside, behind = (code.append_basic_block() for _ in range(3))
        code.branch(head)
        code.position_at_end(head)
        values = [code.phi(value.type) for value in (begin, *carried)]
        code.cbranch(code.icmp_signed("<", values[0], end), inside, behind)
        code.position_at_end(inside)
        next_values = [*body(*values)]
        next_values.insert(0, code.add(values[0], INDEX(by)))
        for value, first, following in zip(values, (begin, *carried), next_values, strict=True):
            value.add_incoming(first, before)
            value.add_incoming(following, code.block)
        code.branch(head)
        code.position_at_end(behind)
        return values[1:]

    def spread(self, value: Any, lanes: int) -> Any:
        """Return a vector of one value; the value itself for one lane."""
        if lanes == 1:
            return value
        first = self.code.insert_element(
            ir.Constant(vector(value.type, lanes), ir.Undefined), value, WORD(0)
        )
        return self.code.shuffle_vector(first, first, vector(WORD, lanes)(None))

    def at(self, array: Any, i: Any, element: Any) -> Any:
        """Return the address of element i of an array."""
        return self.code.gep(array, [i], source_etype=element)

    def load(self, kind: Any, array: Any, i: Any) -> Any:
        """Load element i of an array, or a vector that begins there."""
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        align = {INDEX: 8, POINTER: 8, WORD: 4}.get(element, self.size)
        return self.code.load(self.at(array, i, element), typ=kind, align=align)

    def fetch(self, address: Any, ahead: int) -> None:
        """Have the line so many bytes ahead of an address fetched into the cache; it need not be
        mapped.
        """
        code = self.code
        fetch = self.module.declare_intrinsic(
            "llvm.prefetch", [POINTER], ir.FunctionType(ir.VoidType(), [POINTER, *[WORD] * 3])
        )
        code.call(fetch, [self.at(address, INDEX(ahead), BYTE), WORD(0), WORD(3), WORD(1)])


def vector(element: Any, lanes: int) -> Any:
    """Return the type of a vector; of one element for one lane."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def machine_code(written: Instructions, cpu: str | None = None) -> bytes:
    """Return a function as an object file, for this machine's CPU or another one that LLVM knows
    by name.
    """
    module = llvm.parse_assembly(str(written.module))
    module.verify()
    code: bytes = host_machine(cpu).emit_object(module)
    return code
