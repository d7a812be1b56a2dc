"""One shard's file: safetensors, with a header that follows from its ranges, and chunk checksums.

Bytes are read straight into the arrays that they belong to and verified there, so no second copy of
the state is ever made. The manifest is read here, and written elsewhere.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import xxhash

from distnadam.checkpoint.manifest import CHUNK_BYTES, FileRecord, Manifest
from distnadam.checkpoint.storage.base import Directory, ReadInto
from distnadam.checkpoint.storage.resolve import DirectoryLike, open_directory
from distnadam.errors import CheckpointError
from distnadam.tensors.arrays import Array, Flat, empty_flat
from distnadam.tensors.copy_plan import copy_plan
from distnadam.tensors.layout import Ranges, sizes_of
from distnadam.threads import in_background

_T = TypeVar("_T")
State = dict[str, Flat]
"""A shard's arrays by name, each a 1-D array per dtype space."""
_SAFETENSORS_DTYPE = {"float32": "F32", "float64": "F64"}
_READERS = 4
"""The most threads that read at once."""

Target = tuple[int, Array]
"""An offset in a file, and the byte array to fill from there."""


@dataclass(frozen=True, kw_only=True)
class _ReadJob:
    """Consecutive chunks of one file to read and verify.

    Args:
        read_into: reads the open file.
        path: the file's, for messages.
        record: the file's.
        targets: what to fill, in the order of their offsets; they may lie outside the chunks.
        chunks: the numbers of the chunks.
    """

    read_into: ReadInto
    path: str
    record: FileRecord
    targets: Sequence[Target]
    chunks: range

    @property
    def begin(self) -> int:
        """The offset of the first byte."""
        return self.chunks.start * CHUNK_BYTES

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return min(self.chunks.stop * CHUNK_BYTES, self.record.size)


def header_of(ranges: Ranges, arrays: Collection[str]) -> bytes:
    """Return the safetensors length and JSON header of a file of these arrays, padded with spaces
    to 64 bytes.
    """
    entries: dict[str, object] = {
        "__metadata__": {
            f"range.{space}": f"{begin}:{end}" for space, (begin, end) in ranges.items()
        }
    }
    offset = 0
    for name, space, count in _tensors(ranges, arrays):
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


def write_shard(directory: DirectoryLike, name: str, *, ranges: Ranges, state: State) -> FileRecord:
    """Write one shard's file under its final name, which must be new, and flush it.

    Args:
        directory: the checkpoint's.
        name: the file's, as `store.shard_file_name` makes it.
        ranges: the shard's half-open range in each dtype space.
        state: the shard's arrays, 1-D and contiguous, of these ranges, in the order of the file.

    Raises:
        CheckpointError: naming the file and the system's reason; no partial file is left.
    """
    parts = [
        memoryview(header_of(ranges, state)),
        *(state[array][space].view(np.uint8).data for array, space, _ in _tensors(ranges, state)),
    ]
    checksums: list[int] = []

    def pieces() -> Iterator[memoryview]:
        """Yield the file in pieces that cross no chunk boundary, each just after it was hashed."""
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

    open_directory(directory).write(name, pieces)
    return FileRecord(
        name=name,
        size=sum(map(len, parts)),
        ranges=dict(ranges),
        checksums=tuple(checksums),
        arrays=tuple(state),
    )


def read_shard(
    directory: DirectoryLike,
    manifest: Manifest,
    *,
    ranges: Ranges,
    leftovers: Collection[int] = (),
) -> State:
    """Return new arrays of `ranges`, filled by `fill_shard`."""
    sizes = sizes_of(ranges)
    state = {array: empty_flat(sizes) for array in manifest.state_arrays}
    fill_shard(directory, manifest, ranges=ranges, state=state, leftovers=leftovers)
    return state


def fill_shard(
    directory: DirectoryLike,
    manifest: Manifest,
    *,
    ranges: Ranges,
    state: State,
    leftovers: Collection[int] = (),
) -> None:
    """Fill one new shard's arrays from the old shards' files.

    Only the chunks that overlap the new ranges are read, and each is verified.

    Args:
        directory: the checkpoint's.
        manifest: the checkpoint's.
        ranges: the new shard's; they need not follow the old ones.
        state: arrays of these ranges, of those that were saved; their contents are undefined after
            an error.
        leftovers: indices of files of which this reader verifies every chunk besides.

    Raises:
        CheckpointError: naming the file, and the bytes whose checksum is wrong.
    """
    wanted: dict[int, list[Target]] = {index: [] for index in leftovers}
    for copy in copy_plan([record.ranges for record in manifest.files], ranges):
        old, first = manifest.files[copy.source].ranges, ranges[copy.space][0]
        offsets = _offsets(manifest.files[copy.source])
        for array in state:
            target = state[array][copy.space][copy.begin - first : copy.end - first]
            offset = (
                offsets[array, copy.space] + (copy.begin - old[copy.space][0]) * target.itemsize
            )
            wanted.setdefault(copy.source, []).append((offset, target.view(np.uint8)))
    whole = {index: index in leftovers for index in wanted}
    _read(
        open_directory(directory),
        [(manifest.files[index], wanted[index], whole[index]) for index in sorted(wanted)],
    )


def leftover_readers(manifest: Manifest, num_readers: int) -> list[list[int]]:
    """Return, for each reader, the indices of files that no reader needs: those without elements.

    They are dealt out in turn, so that the readers together verify every file.
    """
    empty = [
        index
        for index, record in enumerate(manifest.files)
        if all(begin == end for begin, end in record.ranges.values())
    ]
    return [empty[reader::num_readers] for reader in range(num_readers)]


def verify_files(directory: DirectoryLike, manifest: Manifest) -> None:
    """Verify every byte of every file; raise CheckpointError naming the first that is refused."""
    _read(open_directory(directory), [(record, [], True) for record in manifest.files])


def check_file_record(directory: Directory, record: FileRecord) -> None:
    """Raise CheckpointError if a file's size in the manifest does not follow from its ranges."""
    needed = len(header_of(record.ranges, record.arrays)) + sum(
        count * np.dtype(space).itemsize
        for _, space, count in _tensors(record.ranges, record.arrays)
    )
    if record.size != needed:
        raise CheckpointError(
            f"{directory}/{record.name}: the manifest gives it {record.size} bytes, its ranges "
            f"need {needed}"
        )


def _tensors(ranges: Ranges, arrays: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """Yield (array, space, elements) in the order of the file."""
    for space, (begin, end) in sorted(ranges.items()):
        for array in arrays:
            yield array, space, end - begin


def _offsets(record: FileRecord) -> dict[tuple[str, str], int]:
    offsets, offset = {}, len(header_of(record.ranges, record.arrays))
    for array, space, count in _tensors(record.ranges, record.arrays):
        offsets[array, space] = offset
        offset += count * np.dtype(space).itemsize
    return offsets


def _read(directory: Directory, wanted: Sequence[tuple[FileRecord, list[Target], bool]]) -> None:
    """Read and verify, for each file, the chunks that its targets touch, or all of them.

    Several threads read, each its own consecutive part of the work.
    """
    at_once = max(1, directory.best_read_bytes // CHUNK_BYTES)
    with contextlib.ExitStack() as opened:
        jobs: list[_ReadJob] = []
        for record, targets, whole in wanted:
            check_file_record(directory, record)
            read_into = opened.enter_context(directory.reading(record.name))
            targets.sort(key=lambda target: target[0])
            jobs += [
                _ReadJob(
                    read_into=read_into,
                    path=f"{directory}/{record.name}",
                    record=record,
                    targets=targets,
                    chunks=chunks,
                )
                for chunks in _chunks_to_read(record, targets, whole, at_once)
            ]
        _share_out(jobs, lambda share: _read_jobs(share, at_once))


def _chunks_to_read(
    record: FileRecord, targets: Sequence[Target], whole: bool, at_once: int
) -> list[range]:
    """Return the numbers of the chunks to read, as ranges of at most `at_once`."""
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
    """Run `work` on consecutive parts of the jobs, in as many threads as there are CPUs."""
    count = min(_READERS, len(os.sched_getaffinity(0)), len(jobs))
    if count <= 1:
        work(jobs)
        return
    bounds = [len(jobs) * i // count for i in range(count + 1)]
    parts = [jobs[low:high] for low, high in pairwise(bounds)]
    futures = [in_background("reader", partial(work, part)) for part in parts]
    wait(futures)
    for future in futures:
        future.result()


def _read_jobs(jobs: Sequence[_ReadJob], at_once: int) -> None:
    scratch = memoryview(bytearray(at_once * CHUNK_BYTES if jobs else 0))
    for job in jobs:
        pieces = _pieces(job.targets, job.begin, job.end, scratch)
        job.read_into(pieces, job.begin)
        _verify(pieces, job)


def _pieces(
    targets: Sequence[Target], begin: int, end: int, scratch: memoryview
) -> list[memoryview]:
    """Return the buffers for the bytes [begin, end) of a file: parts of targets, else `scratch`."""
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


def _verify(pieces: list[memoryview], job: _ReadJob) -> None:
    """Raise CheckpointError unless each chunk has its checksum, and the first the right header."""
    record, path = job.record, job.path
    rest = list(reversed(pieces))
    for number in job.chunks:
        digest = xxhash.xxh3_64()
        begin, end = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, record.size)
        room = end - begin
        while room:
            piece = rest.pop()
            if len(piece) > room:
                rest.append(piece[room:])
                piece = piece[:room]
            digest.update(piece)
            room -= len(piece)
        if digest.intdigest() != record.checksums[number]:
            raise CheckpointError(f"{path}: bytes [{begin}, {end}) do not have their checksum")
    header = header_of(record.ranges, record.arrays)
    if job.begin == 0 and bytes(pieces[0][: len(header)]) != header:
        raise CheckpointError(f"{path}: its header is not that of its ranges")
