"""A description of a checkpoint reports damage instead of refusing it."""

import json
from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.inspect import REFUSED, UNREAD, VERIFIED, describe


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    params = {"w": np.ones((3, 5), np.float32), "half": np.ones(4, np.float16)}
    with DistNadam(num_shards=2, num_workers=2, backend="local").build(params) as optimizer:
        return Path(optimizer.save(tmp_path, data={"position": 7}))


def test_it_holds_settings_tensors_files_and_sizes(saved: Path) -> None:
    found = describe(saved, store.load(saved))
    assert found["path"] == str(saved)
    assert (found["iterations"], found["round"], found["skipped"]) == (0, 0, 0)
    assert found["data"] == {"position": 7}
    assert found["topology"]["num_shards"] == 2
    assert [(t["path"], t["shape"], t["dtype"], t["space"]) for t in found["tensors"]] == [
        ("half", [4], "float16", "float32"),
        ("w", [3, 5], "float32", "float32"),
    ]
    first, second = (file["ranges"]["float32"] for file in found["files"])
    assert (first[0], first[1], second[1]) == (0, second[0], 19)
    sizes = found["sizes"]
    assert (sizes["elements"], sizes["state_bytes"]) == (19, 12 * 19)
    assert sizes["file_bytes"] == sum(p.stat().st_size for p in saved.glob("shard-*"))
    assert sizes["manifest_bytes"] == (saved / store.MANIFEST).stat().st_size
    assert found["checksums"] == VERIFIED
    assert json.loads(json.dumps(found)) == found


def test_a_damaged_file_is_reported_with_the_reason_and_the_others_verify(saved: Path) -> None:
    victim = next(saved.glob("shard-00001-*"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    found = describe(saved, store.load(saved))
    assert found["checksums"] == REFUSED
    first, second = (file["checksums"] for file in found["files"])
    assert first == VERIFIED
    assert "do not have their checksum" in second
    assert victim.name in second


def test_without_reading_only_missing_files_are_reported(saved: Path) -> None:
    next(saved.glob("shard-00000-*")).unlink()
    found = describe(saved, store.load(saved), read=False)
    assert found["checksums"] == UNREAD
    first, second = (file["checksums"] for file in found["files"])
    assert "is missing, or not of" in first
    assert second == UNREAD
