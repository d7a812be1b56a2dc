"""Values as plain data, which msgpack and JSON both hold, and back: equal, and of the same types,
except that a value of a subclass comes back as one of the type that it extends.

None, bool, numbers, str, dicts with keys of str, and one kind of sequence stand for themselves.
Everything else that is kept is a dict with one key, a tag that begins with "$". What cannot be kept
is refused by its key. Pure.
"""

import base64
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distnadam.errors import ConfigError
from distnadam.tensors.arrays import dtype_of

NOT_PARSED = (ValueError, RecursionError)
"""What parsers of JSON and TOML raise: the second where a text is nested without end."""
MOST_LEVELS = 64
"""How deep values may be nested."""
_MOST_SHOWN = 80
_KINDS = "biufcSUmM"
"""The kinds of NumPy dtypes whose elements are their bytes."""


def _decline(value: Any, where: str, level: int) -> Any:
    raise ConfigError(
        f"{where}: expected None, bool, int, float, str, bytes, list, tuple, dict, or a NumPy "
        f"array or scalar, got {_shown(value)}; give it as one of these"
    )


def _no_other(mapping: dict[str, Any]) -> Any:
    return None


@dataclass(frozen=True, kw_only=True)
class PlainData:
    """A way to write values as plain data.

    Args:
        bare: the kind of sequence that is written as a bare array; the other one has a tag.
        pack_other: returns the plain data of a value of any other type, given its place and level;
            or raises ConfigError.
        reserved: sets of keys of the dicts that `pack_other` returns.
        unpack_reserved: returns the value of such a dict.
    """

    bare: type[list[Any]] | type[tuple[Any, ...]] = list
    pack_other: Callable[[Any, str, int], Any] = _decline
    reserved: tuple[frozenset[str], ...] = ()
    unpack_reserved: Callable[[dict[str, Any]], Any] = _no_other

    def pack(self, value: Any, where: str, level: int = 0) -> Any:
        """Return a value as plain data that shares nothing with it.

        Args:
            value: what to keep.
            where: its place, which begins the message of an error.
            level: how deep it lies.

        Raises:
            ConfigError: naming the place of something that cannot be kept.
        """
        if level > MOST_LEVELS:
            raise ConfigError(
                f"{where[:60]}...: is deeper than {MOST_LEVELS} levels, or holds itself"
            )
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, np.generic) or type(value) is np.ndarray:
            return _pack_numpy(value, where)
        if isinstance(value, int):
            number = int(value)
            return number if -(1 << 63) <= number < 1 << 64 else {"$int": hex(number)}
        if isinstance(value, float):
            real = float(value)
            return real if math.isfinite(real) else {"$float": str(real)}
        if isinstance(value, str):
            return _pack_text(str(value) if type(value) is str else str.__str__(value))
        if isinstance(value, bytes):
            return {"$bytes": _ascii(bytes(value))}
        if isinstance(value, (list, tuple)):
            items = [self.pack(v, f"{where}[{i}]", level + 1) for i, v in enumerate(value)]
            kind = list if isinstance(value, list) else tuple
            return items if kind is self.bare else {f"${kind.__name__}": items}
        if isinstance(value, dict):
            return self._pack_dict(value, where, level + 1)
        return self.pack_other(value, where, level)

    def unpack(self, packed: Any) -> Any:
        """Return the value of plain data.

        Raises:
            ConfigError: it is none that `pack` returns.
        """
        if isinstance(packed, list):
            return self._sequence(packed)
        if not isinstance(packed, dict):
            return packed
        tag = _tag(packed)
        if tag is not None:
            return self._unpack_tag(tag, packed[tag])
        if packed.keys() in self.reserved:
            return self.unpack_reserved(packed)
        return {key: self.unpack(value) for key, value in packed.items()}

    def _pack_dict(self, mapping: dict[Any, Any], where: str, level: int) -> Any:
        pairs = [
            (
                self.pack(key, f"{where}: key {_shown(key)}", level + 1),
                self.pack(value, f"{where}[{_shown(key)}]", level + 1),
            )
            for key, value in mapping.items()
        ]
        packed = {key: value for key, value in pairs if isinstance(key, str)}
        is_bare = len(packed) == len(pairs) and _tag(packed) is None
        if is_bare and packed.keys() not in self.reserved:
            return packed
        return {"$dict": [list(pair) for pair in pairs]}

    def _sequence(self, items: Iterable[Any]) -> Any:
        return self.bare([self.unpack(item) for item in items])

    def _unpack_tag(self, tag: str, body: Any) -> Any:
        try:
            if tag == "$dict":
                return {self.unpack(key): self.unpack(value) for key, value in body}
            if tag in ("$list", "$tuple"):
                kind = list if tag == "$list" else tuple
                return kind([self.unpack(item) for item in body])
            return _ATOMS[tag](body)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{tag}: cannot be read: {_shown(body)}: {error}") from error


def _tag(packed: dict[Any, Any]) -> str | None:
    key = next(iter(packed)) if len(packed) == 1 else None
    return key if isinstance(key, str) and key.startswith("$") else None


def _pack_text(text: str) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as in names of files that are no UTF-8
        return {"$str": _ascii(text.encode("utf-8", "surrogatepass"))}
    return text


def _pack_numpy(value: Any, where: str) -> Any:
    array = np.asarray(value)  # an empty string's own bytes are not those of its dtype
    dtype = array.dtype
    name = "bfloat16" if dtype == dtype_of("bfloat16") else dtype.str
    if dtype.kind not in _KINDS and name != "bfloat16":
        raise ConfigError(
            f"{where}: expected NumPy numbers, bools, strings or times, got dtype {dtype}"
        )
    data = _ascii(array.tobytes())
    if isinstance(value, np.generic):
        return {"$scalar": [name, data]}
    return {"$array": [name, list(array.shape), data]}


def _unpack_array(name: str, shape: list[int], data: str) -> Any:
    dtype = dtype_of(name)
    if dtype.kind not in _KINDS and name != "bfloat16":
        raise ValueError(f"dtype {name!r}")
    raw = _bytes(data)
    if len(raw) != dtype.itemsize * int(np.prod(shape, dtype=object)):
        raise ValueError(f"{len(raw)} bytes for shape {shape} of {name}")
    return np.ndarray(shape, dtype, bytearray(raw))


def _unpack_scalar(name: str, data: str) -> Any:
    return _unpack_array(name, [], data)[()]


def _ascii(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_ATOMS: dict[str, Callable[[Any], Any]] = {
    "$int": lambda body: int(body, 16),
    "$float": float,
    "$str": lambda body: _bytes(body).decode("utf-8", "surrogatepass"),
    "$bytes": _bytes,
    "$array": lambda body: _unpack_array(*body),
    "$scalar": lambda body: _unpack_scalar(*body),
}


def _shown(value: Any) -> str:
    """Return a short ASCII text of a value, with its type unless it is a key's."""
    text = " ".join(ascii(value).split())
    text = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return text if isinstance(value, (str, int)) else f"{type(value).__name__} {text}"
