"""One shard's file: a safetensors file whose header follows from its ranges alone, checksummed chunk by chunk. No manifest is written here.

Every byte that is read is verified before it is used, in a buffer of one chunk; no copy of the state is ever made.
"""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from distnadam.arrays import Array, Flat, empty_flat
from distnadam.checkpoint.manifest import CHUNK_BYTES, FileRecord, Manifest
from distnadam.errors import CheckpointError
from distnadam.layout import Ranges
from distnadam.reshard import copy_plan

State = dict[str, Flat]
"""A shard's arrays: "params", "m" and "v", each one 1-D array per space."""
ARRAYS = ("params", "m", "v")
_SAFETENSORS_DTYPE = {"float32": "F32", "float64": "F64"}


def header_of(ranges: Ranges) -> bytes:
    """Return the file's first bytes: length and JSON header as safetensors has them, filled with spaces to a multiple of 64."""
    entries: dict[str, object] = {"__metadata__": {f"range.{space}": f"{begin}:{end}" for space, (begin, end) in ranges.items()}}
    offset = 0
    for name, space, count in _tensors(ranges):
        size = count * np.dtype(space).itemsize
        entries[f"{name}.{space}"] = {"dtype": _SAFETENSORS_DTYPE[space], "shape": [count], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def write_shard(directory: Path, name: str, *, ranges: Ranges, state: State) -> FileRecord:
    """Write one shard's file under its final name, which must be new, and flush it to the disk.

    Raises:
        CheckpointError: naming the file and what the system said; no partial file is left.
    """
    path = directory / name
    pieces = [memoryview(header_of(ranges)), *(state[array][space].view(np.uint8).data for array, space, _ in _tensors(ranges))]
    checksums, digest, room, size = [], xxhash.xxh3_64(), CHUNK_BYTES, 0
    try:
        with open(path, "xb", buffering=0) as file:
            for view in pieces:
                while view:
                    part, view = view[:room], view[room:]
                    digest.update(part)
                    _write_all(file.fileno(), part)
                    size, room = size + len(part), room - len(part)
                    if room == 0:
                        checksums.append(digest.intdigest())
                        digest, room = xxhash.xxh3_64(), CHUNK_BYTES
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise CheckpointError(f"{path}: exists already") from error
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    if room < CHUNK_BYTES:
        checksums.append(digest.intdigest())
    return FileRecord(name, size, dict(ranges), tuple(checksums))


def read_shard(directory: Path, manifest: Manifest, *, ranges: Ranges, leftovers: Collection[int] = ()) -> State:
    """Return one new shard's arrays, read from the old shards' files, each chunk verified before it is used.

    Args:
        directory: the checkpoint's.
        manifest: the checkpoint's.
        ranges: the new shard's, cut as one likes.
        leftovers: indices of files whose every other chunk this reader verifies too.

    Raises:
        CheckpointError: naming the file, and the bytes that do not have their checksum.
    """
    sizes = {space: end - begin for space, (begin, end) in ranges.items()}
    state = {array: empty_flat(sizes) for array in ARRAYS}
    wanted: dict[int, list[tuple[int, Array]]] = {index: [] for index in leftovers}
    for copy in copy_plan([record.ranges for record in manifest.files], ranges):
        old, first = manifest.files[copy.source].ranges, ranges[copy.space][0]
        offsets = _offsets(old)
        for array in ARRAYS:
            target = state[array][copy.space][copy.begin - first : copy.end - first]
            offset = offsets[array, copy.space] + (copy.begin - old[copy.space][0]) * target.itemsize
            wanted.setdefault(copy.source, []).append((offset, target.view(np.uint8)))
    for index, targets in sorted(wanted.items()):
        _read_file(directory / manifest.files[index].name, manifest.files[index], targets, whole=index in leftovers)
    return state


def leftover_readers(manifest: Manifest, num_readers: int) -> list[list[int]]:
    """Deal the files out to the readers, so that together they verify every byte, wanted or not."""
    return [list(range(reader, len(manifest.files), num_readers)) for reader in range(num_readers)]


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Verify every byte of every file; raise CheckpointError naming the first that is refused."""
    for record in manifest.files:
        _read_file(directory / record.name, record, [], whole=True)


def _tensors(ranges: Ranges) -> Iterator[tuple[str, str, int]]:
    """Yield (array, space, elements) in the order of the file."""
    for space, (begin, end) in sorted(ranges.items()):
        for array in ARRAYS:
            yield array, space, end - begin


def _offsets(ranges: Ranges) -> dict[tuple[str, str], int]:
    offsets, offset = {}, len(header_of(ranges))
    for array, space, count in _tensors(ranges):
        offsets[array, space] = offset
        offset += count * np.dtype(space).itemsize
    return offsets


def _read_file(path: Path, record: FileRecord, targets: Sequence[tuple[int, Array]], *, whole: bool) -> None:
    """Copy parts of a file, given as (offset, bytes to fill), verifying each chunk touched, or all of them where `whole`."""
    header = header_of(record.ranges)
    data = sum(count * np.dtype(space).itemsize for _, space, count in _tensors(record.ranges))
    if record.size != len(header) + data:
        raise CheckpointError(f"{path}: the manifest gives it {record.size} bytes, its ranges need {len(header) + data}")
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise CheckpointError(f"{path}: is missing, or no file")
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                raise CheckpointError(f"{path}: has {size} bytes, expected {record.size}")
            for number, checksum in enumerate(record.checksums):
                begin, end = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, record.size)
                touched = [(o, t) for o, t in targets if o < end and begin < o + len(t)]
                if not touched and not whole:
                    continue
                chunk = buffer[: end - begin]
                if os.preadv(file.fileno(), [chunk.data], begin) != len(chunk) or xxhash.xxh3_64_intdigest(chunk.data) != checksum:
                    raise CheckpointError(f"{path}: bytes [{begin}, {end}) do not have their checksum")
                if begin == 0 and bytes(chunk[: len(header)]) != header[: len(chunk)]:
                    raise CheckpointError(f"{path}: its header is not that of its ranges")
                for offset, target in touched:
                    low, high = max(begin, offset), min(end, offset + len(target))
                    target[low - offset : high - offset] = chunk[low - begin : high - begin]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
