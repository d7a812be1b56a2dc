"""Describes one checkpoint as plain data: its manifest, its sizes, and which files verify.

Nothing is refused here: a file that is missing or damaged is reported with the reason.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import FileRecord, Manifest
from distnadam.checkpoint.shard_file import verify_files
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import DirectoryLike, open_directory
from distnadam.errors import CheckpointError, ConfigError
from distnadam.groups import Group, groups_of
from distnadam.tensors.layout import Layout

VERIFIED, UNREAD, REFUSED = "verified", "not read", "refused"
"""The state of a checkpoint's checksums; a single file's is one of the first two, or a reason."""


def describe(path: DirectoryLike, manifest: Manifest, *, read: bool = True) -> dict[str, Any]:
    """Return what a checkpoint holds, as `distnadam inspect --json` prints it.

    Args:
        path: the checkpoint's directory.
        manifest: the checkpoint's.
        read: verify every byte; False only checks that the files have their sizes, and reports
            their checksums as "not read".
    """
    layout = Layout.from_dict(manifest.layout)
    groups = [Group(each["pattern"]) for each in manifest.config["groups"]]
    try:
        group_of = groups_of(groups, [t.path for t in layout.tensors])
    except ConfigError:  # a group without a tensor: `restore` says which
        group_of = [-1] * len(layout.tensors)
    clock = manifest.clock
    directory = open_directory(path)
    sizes = directory.files()
    files = [
        _describe_file(directory, sizes.get(record.name), manifest, record, read)
        for record in manifest.files
    ]
    return {
        "path": str(directory),
        "iterations": manifest.iterations,
        "m_schedule": manifest.m_schedule,
        "round": manifest.round,
        "skipped": manifest.skipped,
        "config": manifest.config,
        "options": manifest.options,
        "topology": manifest.topology,
        "run": manifest.run,
        "data": manifest.data,
        "tensors": [
            {
                "path": t.path,
                "steps": clock.of_tensor(index).steps,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "space": t.space,
                "begin": t.begin,
                "end": t.end,
                "group": None if number < 0 else groups[number].pattern,
            }
            for index, (t, number) in enumerate(zip(layout.tensors, group_of, strict=True))
        ],
        "files": files,
        "sizes": {
            "elements": layout.num_elements,
            "state_bytes": layout.array_bytes * len(manifest.state_arrays),
            "file_bytes": sum(record.size for record in manifest.files),
            "manifest_bytes": sizes.get(store.MANIFEST, 0),
        },
        "checksums": _summary([f["checksums"] for f in files], read),
        "arrays": list(manifest.state_arrays),
    }


def _summary(verdicts: Sequence[str], read: bool) -> str:
    if not read:
        return UNREAD
    return VERIFIED if all(verdict == VERIFIED for verdict in verdicts) else REFUSED


def _describe_file(
    directory: Directory, size: int | None, manifest: Manifest, record: FileRecord, read: bool
) -> dict[str, Any]:
    verdict = UNREAD
    try:
        if size != record.size:
            raise CheckpointError(
                f"{directory}/{record.name}: is missing, or not of {record.size} bytes"
            )
        if read:
            verify_files(directory, dataclasses.replace(manifest, files=(record,)))
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
