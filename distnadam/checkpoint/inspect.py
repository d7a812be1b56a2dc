"""What one checkpoint holds, as plain data: everything of its manifest, sizes, and the state of
every file's checksums.
"""

import dataclasses
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import FileRecord, Manifest
from distnadam.checkpoint.shard_file import ARRAYS, verify_files
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import place
from distnadam.errors import CheckpointError
from distnadam.tensors.layout import Layout

VERIFIED, UNREAD = "verified", "not read"


def describe(directory: store.Where, manifest: Manifest, *, read: bool = True) -> dict[str, Any]:
    """Return what a checkpoint holds.

    Args:
        directory: the checkpoint's.
        manifest: the checkpoint's.
        read: verify every byte; otherwise the files are only looked up and their checksums' state
            is "not read".
    """
    layout = Layout.from_dict(manifest.layout)
    folder = place(directory)
    there = folder.files()
    files = [
        _file(folder, there.get(record.name), manifest, record, read) for record in manifest.files
    ]
    size = there.get(store.MANIFEST, 0)
    return {
        "path": str(folder),
        "iterations": manifest.iterations,
        "m_schedule": manifest.m_schedule,
        "round": manifest.round,
        "skipped": manifest.skipped,
        "config": manifest.config,
        "options": manifest.options,
        "topology": manifest.topology,
        "data": manifest.data,
        "tensors": [
            {
                "path": t.path,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "space": t.space,
                "begin": t.begin,
                "end": t.end,
            }
            for t in layout.tensors
        ],
        "files": files,
        "sizes": {
            "elements": layout.num_elements,
            "state_bytes": layout.state_bytes,
            "file_bytes": sum(record.size for record in manifest.files),
            "manifest_bytes": size,
        },
        "checksums": UNREAD
        if not read
        else VERIFIED
        if all(f["checksums"] == VERIFIED for f in files)
        else "refused",
        "arrays": list(ARRAYS),
    }


def _file(
    folder: Directory, size: int | None, manifest: Manifest, record: FileRecord, read: bool
) -> dict[str, Any]:
    verdict = UNREAD
    try:
        if size != record.size:
            raise CheckpointError(
                f"{folder}/{record.name}: is missing, or not of {record.size} bytes"
            )
        if read:
            verify_files(folder, dataclasses.replace(manifest, files=(record,)))
            verdict = VERIFIED
    except CheckpointError as error:
        verdict = str(error)
    return {
        "name": record.name,
        "bytes": record.size,
        "ranges": {space: list(cut) for space, cut in record.ranges.items()},
        "chunks": len(record.checksums),
        "checksums": verdict,
    }
