"""Writes files whole or not at all, and reads untrusted NumPy archives.

No pickle is ever loaded, and no size in a file is believed before it is checked.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from distnadam.errors import CheckpointError
from distnadam.plain_data import NOT_PARSED
from distnadam.tensors.arrays import Array

ABOUT = "about"
"""The entry that describes a file of ours, a JSON string."""
_MARK = "distnadam interop"
_MAX_RATIO = 1100
"""The largest ratio of deflate; an entry that claims more is an attack."""
_LARGEST_ABOUT = 1 << 28


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file in one atomic step; leave nothing behind on failure.

    Args:
        path: the file to create or replace.
        write: fills the temporary file whose path it receives.

    Raises:
        CheckpointError: naming the file and the system's reason.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_npz(path: Path, arrays: Mapping[str, Array], about: Mapping[str, Any]) -> None:
    """Write an uncompressed npz file of `arrays` and the description `about`."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in {**arrays, ABOUT: np.array(about_text(about))}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)

    write_whole(path, write)


def read_npz(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return an npz file's arrays in their order, and its description, empty if it has none.

    Raises:
        CheckpointError: naming the file, and the entry that is truncated, holds objects, or claims
            more than it holds.
    """
    arrays: dict[str, Array] = {}
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in arrays:
                    raise CheckpointError(
                        f"{path}: entry {info.filename!r}: expected one .npy array of each name"
                    )
                if info.file_size > _MAX_RATIO * info.compress_size + 1024:
                    raise CheckpointError(
                        f"{path}: entry {name!r}: claims {info.file_size} bytes from "
                        f"{info.compress_size}"
                    )
                try:
                    with archive.open(info) as entry:
                        _check_header(entry, info.file_size)
                    with archive.open(info) as entry:
                        arrays[name] = np.lib.format.read_array(entry, allow_pickle=False)
                except (
                    ValueError,
                    EOFError,
                    zipfile.BadZipFile,
                    NotImplementedError,
                    RuntimeError,
                    zlib.error,
                ) as error:
                    raise CheckpointError(
                        f"{path}: entry {name!r} cannot be read: {error}"
                    ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: is no npz file, or a truncated one: {error}") from error
    text = arrays.pop(ABOUT, None)
    if text is None:
        return arrays, {}
    if text.shape != () or text.dtype.kind != "U":
        raise CheckpointError(
            f"{path}: entry {ABOUT!r}: expected one string, got shape {text.shape} and dtype "
            f"{text.dtype}"
        )
    return arrays, about_from(str(path), str(text))


def about_text(about: Mapping[str, Any]) -> str:
    """Return a description as JSON text."""
    return json.dumps({"is": _MARK, **about})


def about_from(where: str, text: str) -> dict[str, Any]:
    """Return the description of `about_text`'s text; raise CheckpointError for any other text."""
    try:
        about = json.loads(text) if len(text) <= _LARGEST_ABOUT else None
    except NOT_PARSED as error:
        raise CheckpointError(
            f"{where}: its description cannot be read as JSON: {error}"
        ) from error
    if not isinstance(about, dict) or about.get("is") != _MARK:
        raise CheckpointError(f"{where}: its description is not one that distnadam wrote")
    return about


def expect_kind(path: Path, about: Mapping[str, Any], kind: str) -> None:
    """Raise CheckpointError if a file's description names another kind; it may have none."""
    if about and about.get("kind") != kind:
        raise CheckpointError(
            f"{path}: expected a file of kind {kind!r}, got {about.get('kind')!r}; import it as "
            "that"
        )


def settings_of(where: str, about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration in a description, empty if it has none.

    Raises:
        CheckpointError: it is no map.
    """
    settings = about.get("config", {})
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: its config: expected a map, got {type(settings).__name__}")
    return settings


def group(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries under ``prefix/``, by the rest of their names."""
    return {
        name.removeprefix(f"{prefix}/"): array
        for name, array in arrays.items()
        if name.startswith(f"{prefix}/")
    }


def _check_header(entry: IO[bytes], size: int) -> None:
    """Raise ValueError if an entry of `size` bytes holds objects or another number of elements."""
    version = np.lib.format.read_magic(entry)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"its array format {version} is unknown")
    shape, _, dtype = read(entry)
    count = 1
    for length in shape:
        count *= length
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    if count < 0 or entry.tell() + count * dtype.itemsize != size:
        raise ValueError(
            f"it has {size} bytes, and its header of shape {shape} and dtype {dtype} needs another "
            "number"
        )
