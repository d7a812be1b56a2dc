"""One shard's file: a safetensors file whose header follows from its ranges alone, checksummed
chunk by chunk. No manifest is written here.

What is read goes straight to where it belongs and is verified there; no copy of the state is ever
made.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import xxhash

from distnadam.checkpoint.manifest import CHUNK_BYTES, FileRecord, Manifest
from distnadam.checkpoint.storage.base import Directory, ReadInto
from distnadam.checkpoint.storage.resolve import place
from distnadam.errors import CheckpointError
from distnadam.tensors.arrays import Array, Flat, empty_flat
from distnadam.tensors.copy_plan import copy_plan
from distnadam.tensors.layout import Ranges

_T = TypeVar("_T")
State = dict[str, Flat]
"""A shard's arrays: "params", "m" and "v", each one 1-D array per space."""
ARRAYS = ("params", "m", "v")
_SAFETENSORS_DTYPE = {"float32": "F32", "float64": "F64"}
_READERS = 4
"""Threads that read at once, at most."""

Target = tuple[int, Array]
"""Bytes to fill, and the offset in the file that they begin at."""
Job = tuple[ReadInto, str, FileRecord, list[Target], range]
"""Consecutive chunks of an open file of that full name, to be read and verified."""


def header_of(ranges: Ranges) -> bytes:
    """Return the file's first bytes: length and JSON header as safetensors has them, filled with
    spaces to a multiple of 64.
    """
    entries: dict[str, object] = {
        "__metadata__": {
            f"range.{space}": f"{begin}:{end}" for space, (begin, end) in ranges.items()
        }
    }
    offset = 0
    for name, space, count in _tensors(ranges):
        size = count * np.dtype(space).itemsize
        entries[f"{name}.{space}"] = {
            "dtype": _SAFETENSORS_DTYPE[space],
            "shape": [count],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    directory: str | os.PathLike[str] | Directory, name: str, *, ranges: Ranges, state: State
) -> FileRecord:
    """Write one shard's file under its final name, which must be new, and flush it to where it
    lasts.

    Raises:
        CheckpointError: naming the file and what the system said; no partial file is left.
    """
    parts = [
        memoryview(header_of(ranges)),
        *(state[array][space].view(np.uint8).data for array, space, _ in _tensors(ranges)),
    ]
    checksums: list[int] = []

    def pieces() -> Iterator[memoryview]:
        """Yield the file piece by piece, no piece in two chunks, each just after it was hashed."""
        checksums.clear()
        digest, room = xxhash.xxh3_64(), CHUNK_BYTES
        for view in parts:
            while view:
                piece, view = view[:room], view[room:]
                digest.update(piece)
                room -= len(piece)
                yield piece
                if room == 0:
                    checksums.append(digest.intdigest())
                    digest, room = xxhash.xxh3_64(), CHUNK_BYTES
        if room < CHUNK_BYTES:
            checksums.append(digest.intdigest())

    place(directory).write(name, pieces)
    return FileRecord(name, sum(map(len, parts)), dict(ranges), tuple(checksums))


def read_shard(
    directory: str | os.PathLike[str] | Directory,
    manifest: Manifest,
    *,
    ranges: Ranges,
    leftovers: Collection[int] = (),
) -> State:
    """Return new arrays, filled as `fill_shard` does."""
    sizes = {space: end - begin for space, (begin, end) in ranges.items()}
    state = {array: empty_flat(sizes) for array in ARRAYS}
    fill_shard(directory, manifest, ranges=ranges, state=state, leftovers=leftovers)
    return state


def fill_shard(
    directory: str | os.PathLike[str] | Directory,
    manifest: Manifest,
    *,
    ranges: Ranges,
    state: State,
    leftovers: Collection[int] = (),
) -> None:
    """Fill one new shard's arrays from the old shards' files: only the chunks that hold something
    of it are read, each is verified.

    Args:
        directory: the checkpoint's.
        manifest: the checkpoint's.
        ranges: the new shard's, cut as one likes.
        state: arrays of these ranges; after an error they hold anything.
        leftovers: indices of files whose every chunk this reader verifies too.

    Raises:
        CheckpointError: naming the file, and the bytes that do not have their checksum.
    """
    wanted: dict[int, list[Target]] = {index: [] for index in leftovers}
    for copy in copy_plan([record.ranges for record in manifest.files], ranges):
        old, first = manifest.files[copy.source].ranges, ranges[copy.space][0]
        offsets = _offsets(old)
        for array in ARRAYS:
            target = state[array][copy.space][copy.begin - first : copy.end - first]
            offset = (
                offsets[array, copy.space] + (copy.begin - old[copy.space][0]) * target.itemsize
            )
            wanted.setdefault(copy.source, []).append((offset, target.view(np.uint8)))
    whole = {index: index in leftovers for index in wanted}
    _read(
        place(directory),
        [(manifest.files[index], wanted[index], whole[index]) for index in sorted(wanted)],
    )


def leftover_readers(manifest: Manifest, num_readers: int) -> list[list[int]]:
    """Deal the files that no reader needs out to the readers: those without elements, for the
    others are read by who needs these.
    """
    empty = [
        index
        for index, record in enumerate(manifest.files)
        if all(begin == end for begin, end in record.ranges.values())
    ]
    return [empty[reader::num_readers] for reader in range(num_readers)]


def verify_files(directory: str | os.PathLike[str] | Directory, manifest: Manifest) -> None:
    """Verify every byte of every file; raise CheckpointError naming the first that is refused."""
    _read(place(directory), [(record, [], True) for record in manifest.files])


def check_file_record(folder: Directory, record: FileRecord) -> None:
    """Raise CheckpointError where a file cannot have the size that the manifest gives it."""
    needed = len(header_of(record.ranges)) + sum(
        count * np.dtype(space).itemsize for _, space, count in _tensors(record.ranges)
    )
    if record.size != needed:
        raise CheckpointError(
            f"{folder}/{record.name}: the manifest gives it {record.size} bytes, its ranges need "
            f"{needed}"
        )


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


def _read(folder: Directory, wanted: Sequence[tuple[FileRecord, list[Target], bool]]) -> None:
    """Read the chunks that are touched, or all of a file's, by several threads, each from one end
    of its share to the other.
    """
    at_once = max(1, folder.run_bytes // CHUNK_BYTES)
    with contextlib.ExitStack() as opened:
        jobs: list[Job] = []
        for record, targets, whole in wanted:
            check_file_record(folder, record)
            read_into = opened.enter_context(folder.reading(record.name))
            targets.sort(key=lambda target: target[0])
            path = f"{folder}/{record.name}"
            jobs += [
                (read_into, path, record, targets, run)
                for run in _runs(record, targets, whole, at_once)
            ]
        _share_out(jobs, lambda share: _read_jobs(share, at_once))


def _runs(record: FileRecord, targets: Sequence[Target], whole: bool, at_once: int) -> list[range]:
    """Return the chunks to be read, in runs of consecutive ones."""
    touched = (
        [(0, record.size)]
        if whole
        else [(offset, offset + len(target)) for offset, target in targets if len(target)]
    )
    spans: list[list[int]] = []
    for begin, end in touched:
        first, last = begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)
        if spans and first <= spans[-1][1]:
            spans[-1][1] = max(last, spans[-1][1])
        else:
            spans.append([first, last])
    return [
        range(low, min(low + at_once, last))
        for first, last in spans
        for low in range(first, last, at_once)
    ]


def _share_out(jobs: list[_T], work: Callable[[Sequence[_T]], None]) -> None:
    count = min(_READERS, len(os.sched_getaffinity(0)), len(jobs))
    if count <= 1:
        work(jobs)
        return
    bounds = [len(jobs) * i // count for i in range(count + 1)]
    with ThreadPoolExecutor(count, "reader") as pool:
        futures = [pool.submit(work, jobs[low:high]) for low, high in pairwise(bounds)]
        for future in futures:
            future.result()


def _read_jobs(jobs: Sequence[Job], at_once: int) -> None:
    scratch = memoryview(bytearray(at_once * CHUNK_BYTES if jobs else 0))
    for read_into, path, record, targets, run in jobs:
        begin, end = run.start * CHUNK_BYTES, min(run.stop * CHUNK_BYTES, record.size)
        pieces = _pieces(targets, begin, end, scratch)
        read_into(pieces, begin)
        _verify(pieces, path, record, run)


def _pieces(
    targets: Sequence[Target], begin: int, end: int, scratch: memoryview
) -> list[memoryview]:
    """Return where the bytes [begin, end) of a file go, in order: to the targets where they are
    wanted, else to `scratch`.
    """
    pieces, reached = [], begin
    for offset, target in targets:
        low, high = max(begin, offset), min(end, offset + len(target))
        if low >= high:
            continue
        if low > reached:
            pieces.append(scratch[reached - begin : low - begin])
        pieces.append(target.data[low - offset : high - offset])
        reached = high
    if reached < end:
        pieces.append(scratch[reached - begin : end - begin])
    return pieces


def _verify(pieces: list[memoryview], path: str, record: FileRecord, run: range) -> None:
    """Compare each chunk with its checksum, and the header with what the ranges say."""
    rest, room = list(reversed(pieces)), CHUNK_BYTES
    for number in run:
        digest = xxhash.xxh3_64()
        room = min(CHUNK_BYTES, record.size - number * CHUNK_BYTES)
        while room:
            piece = rest.pop()
            if len(piece) > room:
                rest.append(piece[room:])
                piece = piece[:room]
            digest.update(piece)
            room -= len(piece)
        if digest.intdigest() != record.checksums[number]:
            begin, end = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, record.size)
            raise CheckpointError(f"{path}: bytes [{begin}, {end}) do not have their checksum")
    header = header_of(record.ranges)
    if run.start == 0 and bytes(pieces[0][: len(header)]) != header:
        raise CheckpointError(f"{path}: its header is not that of its ranges")
