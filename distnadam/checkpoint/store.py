"""Checkpoints in a folder: committed by one atomic replace, found by what is valid, never by a
pointer. Local paths or fsspec URLs.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import check_file_record, verify_files
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import place
from distnadam.errors import CheckpointError

log = logging.getLogger("distnadam")

_T = TypeVar("_T")
MANIFEST = "manifest.msgpack"
Where = str | os.PathLike[str] | Directory
_STEP = re.compile(r"step_(\d{8,18})")
_OURS = re.compile(r"shard-\d{5}-of-\d{5}-([0-9a-f]{16})\.safetensors")
_LARGEST_MANIFEST = 64 << 20


def new_save_id() -> str:
    """Return a name no other save has."""
    return os.urandom(8).hex()


def step_directory(root: Where, decided: int) -> Directory:
    """Return where the checkpoint of a round lies; raise CheckpointError where `root` is itself a
    checkpoint.
    """
    folder = place(root)
    if MANIFEST in folder.files():
        raise CheckpointError(f"{folder}: is a checkpoint; save to the directory that holds it")
    return folder.child(f"step_{decided:08d}")


def shard_file_name(index: int, count: int, save_id: str) -> str:
    """Return the name of one shard's file."""
    return f"shard-{index:05d}-of-{count:05d}-{save_id}.safetensors"


@contextlib.contextmanager
def writing(directory: Where) -> Iterator[None]:
    """Make one checkpoint's directory and hold it for one save; raise CheckpointBusy where another
    save writes there.
    """
    folder = place(directory)
    folder.make()
    with folder.hold():
        yield


def commit(directory: Where, manifest: Manifest) -> None:
    """Make written files a checkpoint: the manifest appears whole or not at all; then files of
    earlier saves there are removed.

    Raises:
        CheckpointError: a shard's file is not to be seen from here, or the manifest cannot be
            written.
    """
    folder = place(directory)
    there = folder.files()
    for record in manifest.files:
        if there.get(record.name) != record.size:
            raise CheckpointError(
                f"{folder}/{record.name}: a shard wrote it but it is not here; save to a disk that "
                "every node with a shard shares,"
                " or to a URL (s3://...)"
            )
    folder.replace(MANIFEST, manifest.to_bytes(), temporary=_temporary(manifest.save_id))
    for name in there:
        if (ours := _OURS.fullmatch(name)) and ours[1] != manifest.save_id:
            folder.remove(name)


def discard_partial(directory: Where, save_id: str) -> None:
    """Remove what a failed save left, and the directory where that empties it; what cannot be
    removed is in nobody's way.
    """
    folder = place(directory)
    with contextlib.suppress(CheckpointError):
        for name in folder.files():
            ours = _OURS.fullmatch(name)
            if (ours and ours[1] == save_id) or name == _temporary(save_id):
                folder.remove(name)
    folder.remove_folder()


def load(directory: Where) -> Manifest:
    """Return one checkpoint's manifest; raise CheckpointError naming the file where there is none,
    or it is refused.
    """
    folder = place(directory)
    return Manifest.from_bytes(folder.read(MANIFEST, _LARGEST_MANIFEST), f"{folder}/{MANIFEST}")


def check_files(directory: Where, manifest: Manifest) -> None:
    """Raise CheckpointError naming a file that is missing, of another size, or too many; no
    contents are read.

    Files of another save, killed before its end, are in nobody's way, and neither are hidden ones.
    """
    folder = place(directory)
    there = folder.files()
    for record in manifest.files:
        check_file_record(folder, record)
        size = there.pop(record.name, None)
        if size is None or size < 0:
            raise CheckpointError(f"{folder}/{record.name}: is missing, or no file")
        if size != record.size:
            raise CheckpointError(
                f"{folder}/{record.name}: has {size} bytes, expected {record.size}"
            )
    for name in there:
        ours = _OURS.fullmatch(name)
        if (
            name != MANIFEST
            and not name.startswith(".")
            and (ours is None or ours[1] == manifest.save_id)
        ):
            raise CheckpointError(f"{folder}/{name}: is no file of this checkpoint")


def verify(directory: Where) -> Manifest:
    """Return one checkpoint's manifest after verifying every byte of it; raise CheckpointError
    naming the file that is refused.
    """
    manifest = load(directory)
    check_files(directory, manifest)
    verify_files(directory, manifest)
    return manifest


def is_one(path: Where) -> bool:
    """Look whether a path means one checkpoint: it holds a manifest, or is named as one is."""
    folder = place(path)
    return _STEP.fullmatch(folder.name) is not None or MANIFEST in folder.files()


def candidates(path: Where, passed_over: list[str]) -> Iterator[tuple[Directory, Manifest]]:
    """Yield the checkpoints that a path can mean, best first; their bytes are verified by who reads
    them.

    One checkpoint means that one. A directory means the newest under it, then older ones; each that
    is refused here gets a sentence in `passed_over`, to which the caller adds what it refuses
    itself.

    Raises:
        CheckpointError: the one is refused, or all are.
    """
    folder = place(path)
    if is_one(folder):
        manifest = load(folder)
        check_files(folder, manifest)
        yield folder, manifest
        return
    if not folder.folders() and not folder.files():
        raise CheckpointError(f"{folder}: is no checkpoint and no directory of checkpoints")
    for step in reversed(steps(folder)):
        try:
            manifest = load(step)
            check_files(step, manifest)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            yield step, manifest
    reasons = f": {'; '.join(passed_over)}" if passed_over else ""
    raise CheckpointError(f"{folder}: holds no valid checkpoint{reasons}")


def find(path: Where) -> tuple[Directory, Manifest, list[str]]:
    """Return the checkpoint meant by a path, and what was passed over.

    One checkpoint means that one: its files are looked at by who reads them. Otherwise the newest
    checkpoint under the path that verifies; each newer one that does not gets a sentence.

    Raises:
        CheckpointError: the one is refused, or there is none that is valid.
    """
    passed_over: list[str] = []
    if is_one(path):
        return place(path), load(path), passed_over
    for folder, manifest in candidates(path, passed_over):
        try:
            verify_files(folder, manifest)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return folder, manifest, passed_over
    raise AssertionError("candidates ends with an error")


def first_that_loads(path: Where, load: Callable[[Directory, Manifest], _T]) -> _T:
    """Return what `load` makes of the first of a path's candidates that it does not refuse; a
    warning says what was passed over.
    """
    passed_over: list[str] = []
    strict, said = is_one(path), 0
    for folder, manifest in candidates(path, passed_over):
        for sentence in passed_over[said:]:
            log.warning("passed over: %s", sentence)
        said = len(passed_over)
        try:
            return load(folder, manifest)
        except CheckpointError as error:
            if strict:
                raise
            passed_over.append(str(error))
    raise AssertionError("candidates ends with an error")


def steps(root: Where) -> list[Directory]:
    """Return the directories under `root` that are named as checkpoints, oldest round first."""
    folder = place(root)
    found = sorted(
        (int(match[1]), name) for name in folder.folders() if (match := _STEP.fullmatch(name))
    )
    return [folder.child(name) for _, name in found]


def prune(
    root: Where,
    keep: int,
    newest: Where,
    *,
    keep_every: int | None = None,
    keep_every_s: float | None = None,
) -> list[Directory]:
    """Delete checkpoints of those up to `newest`, which was just written, and return what was
    deleted, newest first.

    Kept are the last `keep`, those of rounds that are multiples of `keep_every`, and, going on from
    the oldest, one in each `keep_every_s` seconds. One that is not valid, as far as can be seen
    without reading its shards' files, is kept by no rule and counts for none. What lies after
    `newest` is of another history and is left alone.
    """
    last = _round(place(newest))
    upto = [step for step in steps(root) if _round(step) <= last]
    valid = {step.name: manifest for step in upto if (manifest := _looked_at(step)) is not None}
    kept, kept_at = set(list(valid)[-keep:]), float("-inf")
    for name, manifest in valid.items():
        if keep_every_s is not None and manifest.saved_at - kept_at >= keep_every_s:
            kept.add(name)
            kept_at = manifest.saved_at
        if keep_every is not None and manifest.round % keep_every == 0:
            kept.add(name)
    beyond = (
        _number(list(valid)[-keep]) if len(valid) >= keep else 0
    )  # an older one that is not valid is of use to nobody
    deleted = []
    for step in reversed(upto):
        if step.name not in kept and (step.name in valid or _round(step) < beyond):
            remove(step)
            deleted.append(step)
    return deleted


def _looked_at(folder: Directory) -> Manifest | None:
    """Return the manifest of a checkpoint that is valid as far as can be seen without reading its
    shards' files.
    """
    with contextlib.suppress(CheckpointError):
        manifest = load(folder)
        check_files(folder, manifest)
        return manifest
    return None


def _round(folder: Directory) -> int:
    return _number(folder.name)


def _number(name: str) -> int:
    return int(name.removeprefix("step_"))


def _temporary(save_id: str) -> str:
    return f".{MANIFEST}.{save_id}"


def remove(directory: Where) -> None:
    """Delete one checkpoint, its manifest first, so that what is left of it is never taken for
    one.
    """
    folder = place(directory)
    folder.remove(MANIFEST)
    for name in folder.files():
        if _OURS.fullmatch(name) or name.startswith(f".{MANIFEST}."):
            folder.remove(name)
    folder.remove_folder()


def now() -> float:
    """Return the time that a manifest is given, in seconds since 1970."""
    return time.time()
