"""One leaf of a tree as a NumPy array, be it NumPy's, torch's, JAX's or another's. Imports no
framework.

An array may be more than its numbers (a mask that hides some, an axis that is packed away) or less
(no memory behind it). What it stands for is taken, or it is refused with the remedy.
"""

import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from operator import attrgetter, eq
from typing import Any

import numpy as np

from distnadam.errors import StructureError
from distnadam.tensors.arrays import BFLOAT16, NAME_OF, SPACE_OF, Array

_REMEDIES = (
    (Mapping, "give a dict"),
    (Iterable, "give a list, tuple or dict of arrays"),
)
_DENSE = {"toarray": ".toarray()", "todense": ".todense()", "to_dense": ".to_dense()"}


_shape_of, _dtype_of = attrgetter("shape"), attrgetter("dtype")
_AT_A_TIME = 512
"""Leaves that are looked at in one way after the other while they are in the cache."""


def are_plain(leaves: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether leaves are NumPy's own arrays of these shapes, of dtypes that a tensor may have."""
    for first in range(0, len(leaves), _AT_A_TIME):
        some = leaves[first : first + _AT_A_TIME]
        if not (
            set(map(type, some)) == {np.ndarray}
            and all(map(eq, map(_shape_of, some), shapes[first : first + _AT_A_TIME]))
            and NAME_OF.keys() >= set(map(_dtype_of, some))
        ):
            return False
    return True


def as_numpy(leaf: Any) -> Array:
    """Return a leaf's numbers in native byte order, without a copy where its memory allows; what is
    no array becomes a 0-d object array.

    Raises:
        StructureError: it is an array that cannot be read as its numbers alone; the message is a
            clause, to which the caller adds where the leaf is.
    """
    if type(leaf) is np.ndarray and leaf.dtype.isnative:
        return leaf
    torch = sys.modules.get("torch")  # never imported: nothing can be one of its tensors
    try:
        if isinstance(leaf, (np.ndarray, np.generic, float)):
            array = _of_numpy(leaf)
        elif torch is not None and isinstance(leaf, torch.Tensor):
            array = _of_torch(torch, leaf)
        elif hasattr(leaf, "__array__"):
            array = _of_numpy(np.asanyarray(leaf))
        else:
            array = np.empty((), object)
            array[()] = leaf
    except StructureError:
        raise
    except Exception as error:  # of a library that is not ours, and may be anything
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise StructureError(
            f"expected an array whose numbers can be read, got {kind_of(leaf)}, which refuses: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _of_numpy(leaf: Any) -> Array:
    hidden = int(np.ma.getmaskarray(leaf).sum()) if isinstance(leaf, np.ma.MaskedArray) else 0
    if hidden:
        raise StructureError(
            f"expected an array of numbers, got a masked array that hides {hidden} of {leaf.size}; "
            "say what they are, by .filled(value)"
        )
    if isinstance(leaf, np.ndarray) and (hasattr(leaf, "unit") or hasattr(leaf, "units")):
        raise StructureError(
            f"expected an array of numbers, got {kind_of(leaf)} with a unit; give its numbers"
        )
    return np.asarray(leaf)


def _of_torch(torch: Any, leaf: Any) -> Array:
    tensor = leaf.detach()
    if tensor.is_meta:
        raise StructureError(
            "expected an array of numbers, got a torch tensor on the meta device, which has none; "
            "initialise it on a device, as by module.to_empty(device='cpu') and its init"
        )
    if tensor.is_quantized:
        raise StructureError(
            f"expected an array of numbers, got a quantised torch tensor ({tensor.dtype}); give "
            "its .dequantize()"
        )
    if tensor.is_nested:
        raise StructureError(
            "expected an array of one shape, got a nested torch tensor; give its parts, by "
            ".unbind(), each under its own path"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        calls = (f".{call}()" for call in ("full_tensor", "to_tensor") if hasattr(tensor, call))
        remedy = next(calls, "plain tensor")
        raise StructureError(
            f"expected a plain array, got a {type(tensor).__name__}, a torch tensor that stands "
            f"for others; give its {remedy}"
        )
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise StructureError(
            "expected an array of numbers, got a torch tensor whose storage was freed (as FSDP "
            "does); give the whole parameter, as by its summon_full_params"
        )
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.contiguous().view(torch.int16).numpy()).view(BFLOAT16)
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        raise StructureError(
            f"expected float32, float64, float16 or bfloat16, got {tensor.dtype}; give its .float()"
        )
    return np.asarray(tensor.numpy())


def kind_of(leaf: Any) -> str:
    """Return what a leaf is, for an error, without its contents."""
    if leaf is None:
        return "None"
    module, name = type(leaf).__module__, type(leaf).__qualname__
    return name if module == "builtins" else f"{module.partition('.')[0]}'s {name}"


def remedy_of(leaf: Any, dtype: np.dtype[Any]) -> str:
    """Return what to give in place of a leaf that became an array of that dtype, and is none of
    floating-point numbers, as the end of a sentence; empty where there is nothing to say.
    """
    if dtype.name.startswith("float") and dtype not in NAME_OF:  # float8, float128
        return "; give its .astype(np.float32)"
    torch = sys.modules.get("torch")
    if dtype.kind in "biu" and torch is not None and isinstance(leaf, torch.Tensor):
        return (
            "; if it is a buffer, as BatchNorm's, it is no parameter: give "
            "dict(model.named_parameters()), and keep buffers in the methods state and load_state "
            "of a task (see distnadam.training.task.Task)"
        )
    if dtype.kind != "O" or isinstance(leaf, (str, bytes)):
        return ""
    if isinstance(leaf, np.ndarray):
        return "; give its .astype(np.float32)"
    for method, call in _DENSE.items():
        if hasattr(leaf, method):
            return f"; give its {call}"
    if hasattr(leaf, "indices") and hasattr(leaf, "values") and not isinstance(leaf, Mapping):
        return "; give it dense, as by tf.convert_to_tensor or tf.sparse.to_dense"
    return next((f"; {say}" for kind, say in _REMEDIES if isinstance(leaf, kind)), "")


def describe_leaf(leaf: Any, array: Array) -> str:
    """Return what a leaf that became that array is, and what to give in its place, for an error."""
    is_array = array.dtype.kind != "O" or isinstance(leaf, np.ndarray)
    got = f"shape {array.shape} and dtype {array.dtype.name}" if is_array else kind_of(leaf)
    return got + remedy_of(leaf, array.dtype)


def memory_of(leaf: Any) -> Hashable:
    """Return a key that two leaves share if they are one array, or views of the same memory; None
    where that means nothing.
    """
    torch = sys.modules.get("torch")
    if isinstance(leaf, np.ndarray):
        return (leaf.ctypes.data, leaf.nbytes) if leaf.size else None
    if torch is not None and isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or not leaf.numel():
            return None
        return str(leaf.device), leaf.data_ptr(), leaf.numel() * leaf.element_size()
    return None if isinstance(leaf, (np.generic, float)) else id(leaf)


def tied(paths: Iterable[str], leaves: Iterable[Any]) -> dict[str, str]:
    """Return the leaves that share an earlier one's memory: path to that one's path."""
    first: dict[Hashable, str] = {}
    found: dict[str, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        memory = memory_of(leaf)
        if memory is not None and first.setdefault(memory, path) != path:
            found[path] = first[memory]
    return found


def first_of(array: Array, wrong: Array) -> str:
    """Return the first element of an array where `wrong` holds, and its index, for an error."""
    index = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
    return f"{array[index]} at index {index}"


def not_finite(path: str, array: Array, what: str = "params") -> StructureError:
    """Return the error for a parameter that has NaN or infinity."""
    return StructureError(
        f"{what}: {path!r}: expected finite values, got NaN or infinity: "
        f"{first_of(array, ~np.isfinite(array))}"
    )


def parameter(path: str, leaf: Any) -> Array:
    """Return the leaf at a path as a parameter to begin with.

    Raises:
        StructureError: naming the path, if it is no array of finite numbers of a known dtype.
    """
    where = repr(path) if path else "the root"
    if isinstance(leaf, float) and not isinstance(leaf, np.generic):
        raise StructureError(
            f"params: {where}: expected an array, got the Python float {leaf!r}; give "
            f"np.float32({leaf!r})"
        )
    try:
        array = as_numpy(leaf)
    except StructureError as error:
        raise StructureError(f"params: {where}: {error}") from error.__cause__
    if array.dtype.name not in SPACE_OF:
        raise StructureError(
            f"params: {where}: expected dtype {', '.join(SPACE_OF)}, got {array.dtype.name} "
            f"({type(leaf).__name__}){remedy_of(leaf, array.dtype)}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        raise StructureError(
            f"params: {where}: expected finite values, got NaN or infinity: "
            f"{first_of(array, ~finite)}"
        )
    return array
