"""Malicious files: a CheckpointError within bounded memory and time."""

import dataclasses
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import MAGIC, Manifest
from distnadam.checkpoint.msgpack_guard import MAX_OBJECTS, check_msgpack
from distnadam.errors import CheckpointError
from tests.models import bits, params

MEMORY = 64 << 20
"""Bytes that looking at a small hostile file may take at most."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that no test changes."""
    root = tmp_path_factory.mktemp("pristine")
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        return Path(optimizer.save(root))


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the pristine checkpoint, to damage."""
    return copy_of(pristine, tmp_path)


def copy_of(checkpoint: Path, root: Path) -> Path:
    directory = root / checkpoint.name
    directory.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@contextmanager
def bounded() -> Iterator[None]:
    """Assert that the body allocates little memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def body_of(checkpoint: Path) -> dict[str, Any]:
    envelope = msgpack.unpackb((checkpoint / store.MANIFEST).read_bytes())
    body: dict[str, Any] = msgpack.unpackb(envelope["body"], strict_map_key=False)
    return body


def signed(body: bytes) -> bytes:
    """Return a manifest file with this body and the right checksum."""
    packed: bytes = msgpack.packb(
        {"magic": MAGIC, "version": 1, "checksum": xxhash.xxh3_128_hexdigest(body), "body": body}
    )
    return packed


def refused(checkpoint: Path) -> None:
    with bounded(), pytest.raises(CheckpointError):
        DistNadam.restore(checkpoint, backend="local")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xdd\xff\xff\xff\xff", "objects"),
        (b"\xdf\xff\xff\xff\xff", "objects"),
        (b"\xdd\x00\x40\x00\x00" + b"\xc0" * (1 << 22), "objects"),
        (b"\x91" * 100_000 + b"\xc0", "deep"),
        (b"\xc6\xff\xff\xff\xff", "too early|too many"),
        (b"\xdb\xff\xff\xff\xffabc", "too early|too many"),
        (b"\xc7\x08\x01abcdefgh", "no manifest holds"),
        (b"\xd6\xff\x00\x00\x00\x00", "no manifest holds"),
        (b"\xc0\xc0", "too many"),
        (b"", "too early"),
    ],
    ids=[
        "array",
        "map",
        "many",
        "deep",
        "bytes",
        "text",
        "extension",
        "timestamp",
        "tail",
        "nothing",
    ],
)
def test_bytes_that_ask_for_more_than_they_are_are_refused_before_anything_is_made(
    raw: bytes, message: str
) -> None:
    with bounded():
        for given_raw in (raw, signed(raw)):
            with pytest.raises(CheckpointError, match=f"^here.*({message})"):
                Manifest.from_bytes(given_raw, "here")


@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text()
        | st.binary(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
@settings(max_examples=80)
def test_what_msgpack_writes_passes_the_scan(value: Any) -> None:
    check_msgpack(msgpack.packb(value), "here")


def test_a_manifest_may_be_large_but_not_without_bound(saved: Path) -> None:
    with open(saved / store.MANIFEST, "wb") as file:
        file.truncate(1 << 40)
    refused(saved)
    check_msgpack(msgpack.packb([0] * (MAX_OBJECTS - 1)), "here")


def set_shape(body: dict[str, Any]) -> None:
    body["layout"]["tensors"][0][1] = [2**62] * 100_000


def set_shape_of_bools(body: dict[str, Any]) -> None:
    body["layout"]["tensors"][0][1] = [True, 6300]


def set_shards(body: dict[str, Any]) -> None:
    body["topology"]["num_shards"] = 2**60


def set_nan_range(body: dict[str, Any]) -> None:
    body["files"][0][2]["float32"] = [0.0, float("nan")]


def set_negative_range(body: dict[str, Any]) -> None:
    body["files"][0][2]["float32"][0] = -1


def set_overlap(body: dict[str, Any]) -> None:
    body["files"][1][2]["float32"][0] -= 1


def set_gap(body: dict[str, Any]) -> None:
    body["files"][1][2]["float32"][0] += 1


def set_missing_range(body: dict[str, Any]) -> None:
    del body["files"][1]


def set_traversal(body: dict[str, Any]) -> None:
    body["files"][0][0] = "../../../../etc/passwd"


def set_traversal_that_matches(body: dict[str, Any]) -> None:
    body["files"][0][0] = "../" + body["files"][0][0]


def set_newline(body: dict[str, Any]) -> None:
    body["files"][0][0] += "\n"


def set_twice(body: dict[str, Any]) -> None:
    body["files"][1][0] = body["files"][0][0]


def set_size(body: dict[str, Any]) -> None:
    body["files"][0][1] = 2**62


def set_layout(body: dict[str, Any]) -> None:
    body["layout"]["tensors"][0][4] = 2**62


def set_schedule(body: dict[str, Any]) -> None:
    body["m_schedule"] = float("nan")


def set_lr(body: dict[str, Any]) -> None:
    body["config"]["lr"] = float("nan")


def set_class(body: dict[str, Any]) -> None:
    body["config"]["lr"] = {"class_name": "os.system", "config": {"command": "true"}}


def set_deep_tree(body: dict[str, Any]) -> None:
    for _ in range(240):
        body["layout"]["tree"] = {"list": [body["layout"]["tree"]]}


HARM = [value for name, value in sorted(globals().items()) if name.startswith("set_")]


@pytest.mark.parametrize("harm", HARM, ids=lambda f: f.__name__)
def test_a_well_signed_manifest_that_lies_is_refused(
    harm: Callable[[dict[str, Any]], None], saved: Path
) -> None:
    body = body_of(saved)
    harm(body)
    (saved / store.MANIFEST).write_bytes(signed(msgpack.packb(body)))
    refused(saved)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_bytes_flipped_cut_or_spliced_anywhere_are_refused(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    saved = copy_of(pristine, tmp_path_factory.mktemp("spliced"))
    victim = data.draw(st.sampled_from(sorted(saved.iterdir())))
    content = before = victim.read_bytes()
    where = data.draw(st.integers(0, len(content)))
    kind = data.draw(st.sampled_from(["cut", "insert", "replace", "repeat"]))
    length = data.draw(st.integers(1, 64))
    if kind == "cut":
        content = content[:where]
    elif kind == "insert":
        content = content[:where] + data.draw(st.binary(min_size=1, max_size=64)) + content[where:]
    elif kind == "replace":
        content = (
            content[:where]
            + data.draw(st.binary(min_size=1, max_size=64))
            + content[where + length :]
        )
    else:
        content = content[:where] + content[where : where + length] * 2 + content[where + length :]
    victim.write_bytes(content)
    if content != before:
        with bounded(), pytest.raises(CheckpointError, match=victim.name):
            DistNadam.restore(saved, num_shards=2, backend="local")


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2**63,
        float("nan"),
        float("inf"),
        "",
        "x" * 70_000,
        b"",
        b"\0" * 70_000,
        [],
        {},
        [[]] * 50,
    ]
)


@pytest.mark.parametrize("examples", [150, pytest.param(400, marks=pytest.mark.nightly)])
def test_any_part_of_a_well_signed_manifest_may_be_anything_else(
    examples: int, pristine: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @given(data=st.data(), value=ODD)
    @settings(max_examples=examples)
    def check(data: st.DataObject, value: Any) -> None:
        body = body_of(pristine)
        node: Any = body
        key = data.draw(st.sampled_from(sorted(body)))
        while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 3)):
            node = node[key]
            key = data.draw(
                st.sampled_from(
                    sorted(node, key=str) if isinstance(node, dict) else range(len(node))
                )
            )
        if data.draw(st.booleans()) or not isinstance(node, list):
            node[key] = value
        else:
            node.insert(key, value)
        saved = copy_of(pristine, tmp_path_factory.mktemp("odd"))
        (saved / store.MANIFEST).write_bytes(signed(msgpack.packb(body)))
        with bounded():
            try:
                manifest = store.verify(saved)
            except CheckpointError:
                return
        assert isinstance(manifest, Manifest)

    check()


def test_an_extra_file_is_named_and_what_a_killed_save_left_is_not_one(saved: Path) -> None:
    shard = sorted(saved.glob("shard-*"))[0]
    (saved / "shard-00000-of-00002-0123456789abcdef.safetensors").write_bytes(b"a part")
    (saved / ".manifest.msgpack.0123456789abcdef").write_bytes(b"a part")
    store.verify(saved)
    for name in (
        shard.name.replace("shard-00000", "shard-00007"),
        "notes.txt",
        "manifest.msgpack.old",
    ):
        (saved / name).write_bytes(b"more")
        with pytest.raises(CheckpointError, match=f"{name}: is no file of this checkpoint"):
            DistNadam.restore(saved, backend="local")
        (saved / name).unlink()


def test_a_renamed_file_and_a_manifest_of_another_run_are_named(
    saved: Path, tmp_path: Path
) -> None:
    with DistNadam(num_shards=3, backend="local").build(params()) as optimizer:
        other = Path(optimizer.save(tmp_path / "other"))
    mine = (saved / store.MANIFEST).read_bytes()
    (saved / store.MANIFEST).write_bytes((other / store.MANIFEST).read_bytes())
    with pytest.raises(
        CheckpointError, match=f"{sorted(other.glob('shard-*'))[0].name}: is missing"
    ):
        DistNadam.restore(saved, backend="local")
    (saved / store.MANIFEST).write_bytes(mine)
    first, second = sorted(saved.glob("shard-*"))[:2]
    first.rename(saved / "aside")
    second.rename(first)
    (saved / "aside").rename(second)
    with pytest.raises(CheckpointError, match=r"shard-0000[01]"):
        DistNadam.restore(saved, backend="local")


def test_a_checkpoint_may_be_renamed_whole(saved: Path) -> None:
    with DistNadam.restore(saved, backend="local") as optimizer:
        expected = bits(optimizer)
    os.rename(saved, saved.parent / "best")
    with DistNadam.restore(saved.parent / "best", num_shards=1, backend="local") as optimizer:
        assert bits(optimizer) == expected


def test_a_sparse_file_as_large_as_a_lie_is_not_allocated(saved: Path) -> None:
    manifest = store.load(saved)
    record = manifest.files[0]
    with open(saved / record.name, "r+b") as file:
        file.truncate(1 << 42)
    assert dataclasses.is_dataclass(record)
    refused(saved)
