"""A manifest for shard files that a test has written by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from distnadam.checkpoint.manifest import FileRecord, Manifest

SAVE_ID = "0" * 16


def manifest_of(records: Sequence[FileRecord], layout: Mapping[str, Any] | None = None) -> Manifest:
    """Return a manifest that names these files and is empty otherwise."""
    return Manifest(
        save_id=SAVE_ID,
        config={},
        options={},
        topology={},
        layout=dict(layout or {}),
        iterations=0,
        m_schedule=1.0,
        round=0,
        skipped=0,
        ledger={},
        data={},
        files=tuple(records),
    )
