"""The fused step in numba's Python, and its compilation to machine code for this machine's CPU.

The only module that imports numba, and only a process that finds no compiled loop on disk imports
this one (`fused` loads it): the compiler costs a second of CPU and 100 MB. Bit for bit what
`NumPyStepper` computes: the same operations in the same order, no contraction to fused
multiply-add, no reordering, denormals kept.
"""

import re
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm
from numba import types
from numba.extending import intrinsic

from distnadam.errors import KernelError
from distnadam.nadam.fused_abi import BLOCK, ENTRY, PART
from distnadam.nadam.object_code import host_machine
from distnadam.nadam.step_scalars import PER_SETTING


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, _address: Any, like: Any) -> Any:
    """Make a pointer to the dtype of `like`, an array or a type, of an address, so that one
    compilation serves any number of gradients.
    """
    kind = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.uintp, like), generate


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _add(total: Any, address: int, like: Any, begin: int, end: int) -> None:
    """Add elements [begin, end) of the gradient at an address to `total`."""
    other = numba.carray(_pointer(address, like), like.size)[begin:end]
    for i in range(end - begin):
        total[i] = total[i] + other[i]


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _sum_group(
    total: Any, addresses: Any, first: int, last: int, like: Any, begin: int, end: int
) -> None:
    """Leave the sum of the gradients [first, last) in `total`."""
    g = numba.carray(_pointer(addresses[first], like), like.size)[begin:end]
    for i in range(end - begin):
        total[i] = g[i]
    for rank in range(first + 1, last):
        _add(total, addresses[rank], like, begin, end)


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _gradient(
    addresses: Any,
    sizes: Any,
    like: Any,
    begin: int,
    end: int,
    count: Any,
    scale: Any,
    limit: Any,
    mean_address: int,
    spare: Any,
) -> Any:
    """Return the address of elements [begin, end) of the mean, scaled and clipped; a scale or limit
    that is NaN is none.

    Addresses, since an array that is one of two needs numba's reference counts.
    """
    n = end - begin
    mean = numba.carray(_pointer(mean_address, like), n)
    found = types.uintp(addresses[0] + types.uintp(begin * like.itemsize))
    if count != 1:
        last = sizes[0]
        _sum_group(mean, addresses, 0, last, like, begin, end)
        for group in range(1, sizes.size):
            first = last
            last = first + sizes[group]
            if last == first + 1:
                _add(mean, addresses[first], like, begin, end)
            else:
                _sum_group(spare, addresses, first, last, like, begin, end)
                for i in range(n):
                    mean[i] = mean[i] + spare[i]
        for i in range(n):
            mean[i] = mean[i] / count
        found = mean_address
    if scale == scale:
        g = numba.carray(_pointer(found, like), n)
        for i in range(n):
            mean[i] = g[i] * scale
        found = mean_address
    if limit == limit:
        g = numba.carray(_pointer(found, like), n)
        for i in range(n):
            x = g[i] if g[i] > -limit else -limit
            mean[i] = x if x < limit else limit
        found = mean_address
    return found


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _round(new: Any, n: int, address: int) -> None:
    """Write float32 values rounded to bfloat16 to an address, with the bits of `round_into`."""
    bits = numba.carray(_pointer(new.ctypes.data, np.uint32), n)
    rounded = numba.carray(_pointer(address, np.uint16), n)
    for i in range(n):
        x = bits[i]
        high = x >> 16
        quiet = (high & 0x8000) | 0x7FC0
        rounded[i] = quiet if (x & 0x7FFFFFFF) > 0x7F800000 else (x + 0x7FFF + (high & 1)) >> 16


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _copy(kept: Any, address: int) -> None:
    """Copy the mean gradient at an address."""
    g = numba.carray(_pointer(address, kept), kept.size)
    for i in range(kept.size):
        kept[i] = g[i]


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _add_l2(mean: int, gradient: int, p: Any, factor: Any) -> None:
    """Leave the gradient and `factor` times the parameters at the address `mean`."""
    g, total = numba.carray(_pointer(gradient, p), p.size), numba.carray(_pointer(mean, p), p.size)
    for i in range(p.size):
        total[i] = g[i] + p[i] * factor


@numba.njit(error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _update(
    p: Any, m: Any, v: Any, g: Any, new: Any, numbers: Any, has_gradient: bool, decays: bool
) -> None:
    """Step the moments of one block, and leave its new parameters in `new`; the flags are
    constants of each call, so that a loop is made of each.
    """
    gradient, momentum, epsilon = numbers[0], numbers[1], numbers[2]
    k_1, k_2, decay = numbers[3], numbers[4], numbers[5]
    for i in range(p.size):
        moment = m[i] + (g[i] - m[i]) * k_1
        square = v[i] + (g[i] * g[i] - v[i]) * k_2
        m[i] = moment
        v[i] = square
        along = g[i] * gradient + moment * momentum if has_gradient else moment * momentum
        less = along / (np.sqrt(square) + epsilon)
        new[i] = p[i] - (p[i] * decay + less if decays else less)


def _step(
    size: int,
    workers: int,
    groups: int,
    parts: int,
    kept: int,
    mean: int,
    gradients: Any,
    group_sizes: Any,
    parameters: Any,
    first_moments: Any,
    second_moments: Any,
    new_parameters: Any,
    bounds: Any,
    coefficients: Any,
    counted: Any,
    scales: Any,
    scratch: Any,
    kept_mean: Any,
    rounded: int,
) -> None:
    """Step the parts of a range of `size` elements; the arguments are C's: numbers, the address of
    the mean's block, then pointers.
    """
    p_all, m_all = numba.carray(parameters, size), numba.carray(first_moments, size)
    v_all, out_all = numba.carray(second_moments, size), numba.carray(new_parameters, size)
    addresses, keep = numba.carray(gradients, workers), numba.carray(kept_mean, kept)
    sizes = numba.carray(group_sizes, groups)
    new = numba.carray(scratch, BLOCK)
    for part in range(parts):
        first, last = bounds[PART * part], bounds[PART * part + 1]
        setting, scale = bounds[PART * part + 2], scales[bounds[PART * part + 3]]
        numbers = numba.carray(coefficients, PER_SETTING * (setting + 1))[PER_SETTING * setting :]
        has_gradient, decays = numbers[0] == numbers[0], numbers[5] == numbers[5]
        has_l2 = numbers[6] == numbers[6]
        for begin in range(first, last, BLOCK):
            end = min(begin + BLOCK, last)
            found = _gradient(
                addresses, sizes, p_all, begin, end, counted[0], scale, numbers[7], mean, new
            )
            if keep.size > 0:
                _copy(keep[begin:end], found)
            p, m = p_all[begin:end], m_all[begin:end]
            v, out = v_all[begin:end], out_all[begin:end]
            if has_l2:
                _add_l2(mean, found, p, numbers[6])
                found = mean
            g = numba.carray(_pointer(found, p_all), end - begin)
            if has_gradient:
                if decays:
                    _update(p, m, v, g, new, numbers, True, True)
                else:
                    _update(p, m, v, g, new, numbers, True, False)
            elif decays:
                _update(p, m, v, g, new, numbers, False, True)
            else:
                _update(p, m, v, g, new, numbers, False, False)
            for i in range(
                end - begin
            ):  # apart, for where `out` is `p` the loop above would not be vectorised
                out[i] = new[i]
            if rounded != 0 and new.itemsize == 4:
                _round(new, end - begin, types.uintp(rounded + types.uintp(2 * begin)))


def compile_loop(dtype: str) -> bytes:
    """Return the step for a dtype as an object file that defines the function `ENTRY`."""
    element = types.CPointer(getattr(types, dtype))
    signature = types.void(
        *(types.intp,) * 5,
        types.uintp,
        types.CPointer(types.uintp),
        types.CPointer(types.intp),
        *(element,) * 4,
        types.CPointer(types.intp),
        *(element,) * 5,
        types.uintp,
    )
    callback = numba.cfunc(signature, error_model="numpy")(_step)
    module = llvm.parse_assembly(callback.inspect_llvm())
    name = callback.native_name.removeprefix("cfunc.")
    for function in module.functions:  # numba's wrappers and helpers stay out of the object file
        if function.name != name and not function.is_declaration:
            function.linkage = "available_externally"
    entry = module.get_function(name)
    _refuse_helpers(str(entry))
    entry.name = ENTRY
    code: bytes = host_machine().emit_object(module)
    return code


def _refuse_helpers(function: str) -> None:
    """Raise KernelError where a compiled function calls what only a process with numba has."""
    called = re.findall(r'call [^@\n]*@(?:"([^"]+)"|([\w.$]+))', function)
    foreign = {
        name
        for name in (quoted or plain for quoted, plain in called)
        if not re.fullmatch(r"llvm\..*|sqrtf?", name)
    }
    if foreign:
        raise KernelError(
            f"the fused kernel cannot be compiled with numba {numba.__version__}: its code calls "
            f"{', '.join(sorted(foreign))}; use kernel='numpy', or another version of numba"
        )
