"""The manifest: what a checkpoint holds, and the one file whose presence makes it one. Bytes in and
out; no directory is touched here.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import xxhash

from distnadam.checkpoint.msgpack_guard import check_msgpack
from distnadam.config import NadamConfig, Options
from distnadam.errors import CheckpointError, DistNadamError
from distnadam.shard.ledger import Ledger
from distnadam.tensors.layout import Layout, Ranges

FORMAT_VERSION = 1
MAGIC = "distnadam checkpoint"
CHUNK_BYTES = 1 << 20
"""Bytes of a file that one checksum covers."""
_MOST_AXES = 64
_MOST_PROCESSES = 1 << 16
_FILE_NAME = re.compile(r"shard-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class FileRecord:
    """One shard's file: its name, its size in bytes, the ranges it holds, and the xxh3_64 of each
    `CHUNK_BYTES` of it.
    """

    name: str
    size: int
    ranges: Ranges
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint but the arrays. `ledger` and `data` are plain data that the shards
    and the trainer understand.
    """

    save_id: str
    config: dict[str, Any]
    options: dict[str, Any]
    topology: dict[str, Any]
    layout: dict[str, Any]
    iterations: int
    m_schedule: float
    round: int
    skipped: int
    ledger: dict[str, Any]
    data: dict[str, Any]
    files: tuple[FileRecord, ...]
    saved_at: float = 0.0

    def to_bytes(self) -> bytes:
        """Return the manifest file's bytes; raise CheckpointError where `data` is not plain."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["files"] = [
            [
                f.name,
                f.size,
                {s: list(r) for s, r in f.ranges.items()},
                np.array(f.checksums, "<u8").tobytes(),
            ]
            for f in self.files
        ]
        try:
            packed = msgpack.packb(body)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"manifest: holds something that is not plain data: {error}"
            ) from error
        envelope = {
            "magic": MAGIC,
            "version": FORMAT_VERSION,
            "checksum": xxhash.xxh3_128_hexdigest(packed),
            "body": packed,
        }
        return bytes(msgpack.packb(envelope))

    def nadam_config(self, where: str) -> NadamConfig:
        """Return the config; raise CheckpointError, beginning with `where`, where its schedule is
        one that nobody here knows.
        """
        return _understood("config", NadamConfig.from_dict, self.config, where)  # type: ignore[no-any-return]

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> "Manifest":
        """Return the manifest of a file's bytes; raise CheckpointError beginning with `where` and
        saying why it is refused.
        """
        envelope = _unpack(raw, where)
        if envelope.get("magic") != MAGIC:
            raise CheckpointError(f"{where}: is not a manifest of a distnadam checkpoint")
        if envelope.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format version {envelope.get('version')!r}, expected {FORMAT_VERSION}"
            )
        body = envelope.get("body")
        if not isinstance(body, bytes) or xxhash.xxh3_128_hexdigest(body) != envelope.get(
            "checksum"
        ):
            raise CheckpointError(f"{where}: its checksum does not match its contents")
        return _checked(_unpack(body, where), where)


def _unpack(raw: bytes, where: str) -> dict[str, Any]:
    check_msgpack(raw, where)
    try:
        data = msgpack.unpackb(raw, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds for bytes that are not its own
        raise CheckpointError(
            f"{where}: cannot be read as msgpack: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected a map, got {type(data).__name__}")
    return data


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _sane(topology: Mapping[str, Any]) -> bool:
    """Whether a run of this size may be begun because a file says so."""
    counts = [topology[key] for key in ("num_shards", "num_workers", "replicas")]
    return all(_natural(n) and n <= _MOST_PROCESSES for n in counts) and isinstance(
        topology["name"], str | None
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "save_id": lambda v: isinstance(v, str) and re.fullmatch(r"[0-9a-f]{16}", v) is not None,
    "config": lambda v: isinstance(v, dict),
    "options": lambda v: isinstance(v, dict),
    "topology": lambda v: (
        isinstance(v, dict)
        and {"num_shards", "num_workers", "replicas", "name"} <= v.keys()
        and _sane(v)
    ),
    "layout": lambda v: isinstance(v, dict),
    "iterations": _natural,
    "m_schedule": lambda v: isinstance(v, float) and 0.0 <= v <= 1.0,
    "round": _natural,
    "skipped": _natural,
    "ledger": lambda v: isinstance(v, dict) and {"runs", "newest"} <= v.keys(),
    "data": lambda v: isinstance(v, dict),
    "files": lambda v: isinstance(v, list) and len(v) > 0,
    "saved_at": lambda v: isinstance(v, float) and 0.0 <= v < 1e12,
}


def _checked(body: Mapping[str, Any], where: str) -> Manifest:
    """Return the manifest of a body whose every field is of its type and whose parts agree with
    each other.
    """
    if set(body) != set(_FIELDS):
        raise CheckpointError(
            f"{where}: expected the fields {', '.join(_FIELDS)}; got {', '.join(map(str, body))}"
        )
    for field, legal in _FIELDS.items():
        if not legal(body[field]):
            raise CheckpointError(
                f"{where}: field {field!r} has the value {str(body[field])[:80]!r}, which it "
                "cannot have"
            )
    files = tuple(_file(record, body["save_id"], where) for record in body["files"])
    if len({f.name for f in files}) < len(files):
        raise CheckpointError(f"{where}: names a file twice")
    layout = _understood("layout", _layout, body["layout"], where)
    _understood("config", _config, body["config"], where)
    _understood("options", Options.of, body["options"], where)
    _understood("ledger", Ledger.from_dict, body["ledger"], where)
    if max(layout.sizes.values(), default=0) * 12 > sum(f.size for f in files):
        raise CheckpointError(
            f"{where}: its files, of {sum(f.size for f in files)} bytes, cannot hold its layout"
        )
    _check_coverage(layout, files, where)
    return Manifest(**{**body, "files": files})


def _check_coverage(layout: Layout, files: tuple[FileRecord, ...], where: str) -> None:
    """Raise CheckpointError unless the files together hold every element of the layout once."""
    for space, size in layout.sizes.items():
        reached = 0
        for begin, end in sorted(f.ranges.get(space, (0, 0)) for f in files):
            if begin != reached and begin < end:
                raise CheckpointError(
                    f"{where}: {space} element {min(begin, reached)} is in two files or in none; "
                    "expected one"
                )
            reached = max(reached, end)
        if reached != size:
            raise CheckpointError(
                f"{where}: its files hold {reached} {space} elements, its layout {size}"
            )
    if any(set(f.ranges) != set(layout.sizes) for f in files):
        raise CheckpointError(
            f"{where}: a file's ranges are not of the layout's spaces {sorted(layout.sizes)}"
        )


def _config(config: Mapping[str, Any]) -> NadamConfig:
    """Return the config, whatever its schedule: a user's own need not be imported to look at a
    checkpoint.
    """
    return NadamConfig.from_dict(
        {**config, "lr": 0.0 if isinstance(config["lr"], Mapping) else config["lr"]}
    )


def _understood(field: str, read: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return read(value)
    except (
        DistNadamError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"{where}: its {field} is refused: {type(error).__name__}: {error}"
        ) from error


def _file(record: Any, save_id: str, where: str) -> FileRecord:
    told = f"{where}: file record {str(record)[:80]!r}"
    if not isinstance(record, list) or len(record) != 4:
        raise CheckpointError(f"{told}: expected name, size, ranges and checksums")
    name, size, ranges, checksums = record
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or save_id not in name:
        raise CheckpointError(f"{told}: its name is not one that this save can have written")
    if not _natural(size) or not isinstance(checksums, bytes):
        raise CheckpointError(f"{told}: its size must be a whole number, its checksums bytes")
    if len(checksums) != 8 * -(-size // CHUNK_BYTES):
        raise CheckpointError(
            f"{told}: {len(checksums)} bytes of checksums for {size} bytes, expected "
            f"{8 * -(-size // CHUNK_BYTES)}"
        )
    legal = isinstance(ranges, dict) and all(
        isinstance(r, list) and len(r) == 2 and all(map(_natural, r)) and r[0] <= r[1]
        for r in ranges.values()
    )
    if not legal:
        raise CheckpointError(
            f"{told}: its ranges must be pairs of whole numbers, begin before end"
        )
    sums = tuple(np.frombuffer(checksums, "<u8").tolist())
    return FileRecord(
        name, size, {space: (begin, end) for space, (begin, end) in ranges.items()}, sums
    )


def _layout(data: Any) -> Layout:
    """Return the layout, whose every number was looked at before anything is computed from it."""
    for path, shape, dtype, begin, end in data["tensors"]:
        if not (
            isinstance(path, str)
            and isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MOST_AXES
        ):
            raise ValueError(f"tensor {str(path)[:80]!r} has a shape or dtype that none can have")
        if not all(map(_natural, (*shape, begin, end))):
            raise ValueError(
                f"tensor {path[:80]!r} has a shape or place that is not of whole numbers"
            )
    return Layout.from_dict(data)
