"""The manifest: all that a checkpoint holds but the arrays, and the file that makes it one.

Bytes in, a checked `Manifest` out, and back. Files and directories are not touched here; FORMAT.md
describes the fields.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack
import numpy as np
import xxhash

from distnadam.checkpoint.contents import (
    config_from,
    data_from,
    is_natural,
    layout_from,
    options_from,
    packed_options,
    whole_config,
    without_later,
)
from distnadam.checkpoint.msgpack_guard import check_msgpack
from distnadam.config import Options, Settings
from distnadam.errors import CheckpointError, DistNadamError
from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import ScaleState, is_scale_state
from distnadam.nadam.step_scalars import Clock, TensorClocks
from distnadam.shard.ledger import Ledger
from distnadam.tensors.arrays import STATE_ARRAYS
from distnadam.tensors.layout import Layout, Ranges

_T = TypeVar("_T")
FORMAT_VERSION, WITH_CLOCKS = 1, 2
"""The format's version, and that of checkpoints whose tensors have clocks of their own."""
MAGIC = "distnadam checkpoint"
CHUNK_BYTES = 1 << 20
"""Size of the pieces of a file that have one checksum each."""
_MOST_PROCESSES = 1 << 16
SHARD_FILE = re.compile(r"shard-\d{5}-of-\d{5}-([0-9a-f]{16})\.safetensors")
"""The names that `shard_file_name` makes; the group is the save's id."""


def shard_file_name(index: int, count: int, save_id: str) -> str:
    """Return the name of one shard's file."""
    return f"shard-{index:05d}-of-{count:05d}-{save_id}.safetensors"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One shard's file.

    Args:
        name: within the checkpoint's directory.
        size: in bytes.
        ranges: the half-open range that it holds in each dtype space.
        checksums: the xxh3_64 of each `CHUNK_BYTES` of it.
        arrays: the names of what it holds of each space, in order.
    """

    name: str
    size: int
    ranges: Ranges
    checksums: tuple[int, ...]
    arrays: tuple[str, ...] = STATE_ARRAYS


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in its training a state stands."""

    clock: Clock
    round: int
    skipped: int = 0
    ledger: dict[str, Any] = field(default_factory=lambda: Ledger().to_dict())
    loss_scale: ScaleState | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything of a checkpoint but the arrays, as plain data.

    Args:
        save_id: 16 hexadecimal digits, different for each save.
        config: `NadamConfig.to_dict()`.
        options: `Options.to_dict()`, as `plain_data` writes it.
        topology: numbers of shards, workers and replicas, and the optimizer's name.
        layout: `Layout.to_dict()`.
        iterations: steps applied.
        m_schedule: product of the momentum coefficients so far.
        round: protocol rounds decided, skipped ones included.
        skipped: those of them that ended with no step.
        ledger: `Ledger.to_dict()`.
        run: `Settings.run`: the task and seed of a run of `fit`, and what it was given.
        data: what `contents.packed_data` returned of the caller's own; `user_data` gives it back.
        files: the shards' files, by index.
        saved_at: seconds since 1970.
        clocks: `TensorClocks.to_dict()`; {} where all tensors have one.
        loss_scale: `ScaleState` of the next round as a list; None, and in no file, where none is.
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
    run: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    saved_at: float = 0.0
    clocks: dict[str, Any] = field(default_factory=dict)
    loss_scale: list[Any] | None = None

    @classmethod
    def of(
        cls, settings: Settings, layout: Layout, position: Position, data: Mapping[str, Any]
    ) -> "Manifest":
        """Return a new save's manifest, which no file belongs to yet.

        Raises:
            ConfigError: the learning rate is a plain function, which cannot be stored.
        """
        return cls(
            save_id=os.urandom(8).hex(),
            config=settings.config.to_dict(),
            options=packed_options(settings.options),
            topology=settings.topology.to_dict(),
            layout=layout.to_dict(),
            iterations=position.clock.iterations,
            m_schedule=position.clock.m_schedule,
            clocks=tensors.to_dict() if (tensors := position.clock.tensors) else {},
            round=position.round,
            skipped=position.skipped,
            ledger=position.ledger,
            data=dict(data),
            run=dict(settings.run),
            loss_scale=None if position.loss_scale is None else list(position.loss_scale),
        )

    @property
    def scale_state(self) -> ScaleState | None:
        """The state of the loss scale; None if none is kept."""
        return None if self.loss_scale is None else ScaleState(*self.loss_scale)

    @property
    def state_arrays(self) -> tuple[str, ...]:
        """The names of the arrays that every file holds."""
        return self.files[0].arrays

    @property
    def clock(self) -> Clock:
        """How far the optimizer and its tensors are."""
        tensors = TensorClocks.from_dict(self.clocks) if self.clocks else None
        return Clock(self.iterations, self.m_schedule, tensors)

    @property
    def user_data(self) -> dict[str, Any]:
        """The caller's data, equal to what was saved."""
        return data_from(self.data)

    @property
    def saved_options(self) -> Options:
        """The options that the optimizer had."""
        return options_from(self.options)

    def to_bytes(self) -> bytes:
        """Return the manifest file's bytes."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["config"] = without_later(self.config)
        if not self.clocks:
            del body["clocks"]  # which readers of the first version refuse
        if self.loss_scale is None:
            del body["loss_scale"]
        if self.run:
            body["run"] = {**self.run, "given": without_later(self.run["given"])}
        body["files"] = [
            [
                f.name,
                f.size,
                {s: list(r) for s, r in f.ranges.items()},
                np.array(f.checksums, "<u8").tobytes(),
            ]
            for f in self.files
        ]
        packed = msgpack.packb(body)
        envelope = {
            "magic": MAGIC,
            "version": WITH_CLOCKS if self.clocks else FORMAT_VERSION,
            "checksum": xxhash.xxh3_128_hexdigest(packed),
            "body": packed,
        }
        return bytes(msgpack.packb(envelope))

    def nadam_config(self, where: str) -> NadamConfig:
        """Return the config.

        Raises:
            CheckpointError: beginning with `where`; its schedule is of a class not imported here.
        """
        return _parse("config", NadamConfig.from_dict, self.config, where)

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> "Manifest":
        """Return the manifest in a file's bytes.

        Raises:
            CheckpointError: beginning with `where` and giving the reason.
        """
        envelope = _unpack(raw, where)
        if envelope.get("magic") != MAGIC:
            raise CheckpointError(f"{where}: is not a manifest of a distnadam checkpoint")
        version = envelope.get("version")
        if type(version) is not int or version not in (FORMAT_VERSION, WITH_CLOCKS):
            raise CheckpointError(
                f"{where}: format version {version!r}, expected {FORMAT_VERSION} or {WITH_CLOCKS}"
            )
        body = envelope.get("body")
        if not isinstance(body, bytes) or xxhash.xxh3_128_hexdigest(body) != envelope.get(
            "checksum"
        ):
            raise CheckpointError(f"{where}: its checksum does not match its contents")
        return _checked(_unpack(body, where), version, where)


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


def _sane(topology: Mapping[str, Any]) -> bool:
    """Return whether a topology's numbers are small enough to start a run of that size."""
    counts = [topology[key] for key in ("num_shards", "num_workers", "replicas")]
    return all(is_natural(n) and n <= _MOST_PROCESSES for n in counts) and isinstance(
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
    "iterations": is_natural,
    "m_schedule": lambda v: isinstance(v, float) and 0.0 <= v <= 1.0,
    "round": is_natural,
    "skipped": is_natural,
    "ledger": lambda v: isinstance(v, dict) and {"runs", "newest"} <= v.keys(),
    "data": lambda v: isinstance(v, dict),
    "run": lambda v: isinstance(v, dict),
    "files": lambda v: isinstance(v, list) and len(v) > 0,
    "saved_at": lambda v: isinstance(v, float) and 0.0 <= v < 1e12,
    "loss_scale": is_scale_state,
}
_CLOCKS: dict[str, Callable[[Any], bool]] = {"clocks": lambda v: isinstance(v, dict)}
_OPTIONAL = {"loss_scale"}


def _checked(body: Mapping[str, Any], version: int, where: str) -> Manifest:
    """Return the manifest of a body, after checking each field and that the fields agree."""
    fields = _FIELDS | (_CLOCKS if version == WITH_CLOCKS else {})
    if not set(fields) - _OPTIONAL <= set(body) <= set(fields):
        raise CheckpointError(
            f"{where}: expected the fields {', '.join(fields)}; got {', '.join(map(str, body))}"
        )
    for name, legal in fields.items():
        if name in body and not legal(body[name]):
            raise CheckpointError(
                f"{where}: field {name!r} has the value {str(body[name])[:80]!r}, which it "
                "cannot have"
            )
    arrays = _parse("config", config_from, body["config"], where).state_arrays
    files = tuple(_file(record, body["save_id"], arrays, where) for record in body["files"])
    if len({f.name for f in files}) < len(files):
        raise CheckpointError(f"{where}: names a file twice")
    layout = _parse("layout", layout_from, body["layout"], where)
    if version == WITH_CLOCKS:
        clocks = _parse("clocks", TensorClocks.from_dict, body["clocks"], where)
        if len(clocks.index) != len(layout.tensors):
            raise CheckpointError(
                f"{where}: its clocks are of {len(clocks.index)} tensors, its layout has "
                f"{len(layout.tensors)}"
            )
    _parse("options", options_from, body["options"], where)
    _parse("data", data_from, body["data"], where)
    _parse("run", _check_run, body["run"], where)
    _parse("ledger", Ledger.from_dict, body["ledger"], where)
    if max(layout.sizes.values(), default=0) * 4 * len(arrays) > sum(f.size for f in files):
        raise CheckpointError(
            f"{where}: its files, of {sum(f.size for f in files)} bytes, cannot hold its layout"
        )
    _check_coverage(layout, files, where)
    run = body["run"] and {**body["run"], "given": whole_config(body["run"]["given"])}
    return Manifest(**{**body, "config": whole_config(body["config"]), "run": run, "files": files})


def _check_coverage(layout: Layout, files: tuple[FileRecord, ...], where: str) -> None:
    """Raise CheckpointError unless the files together hold each element of the layout once."""
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


def _check_run(run: Mapping[str, Any]) -> None:
    """Raise ValueError, or what `NadamConfig` does, for what no run of `fit` says of itself."""
    if not run:
        return
    if run.keys() - {"accumulate"} != {"task", "seed", "num_workers", "given"}:
        raise ValueError(f"expected task, seed, num_workers and given, got {', '.join(run)}")
    if not isinstance(run["task"], str) or not all(
        map(is_natural, (run["seed"], run["num_workers"], run.get("accumulate", 1)))
    ):
        raise ValueError("expected a name and two whole numbers")
    config_from(run["given"])


def _parse(field: str, parse: Callable[[Any], _T], value: Any, where: str) -> _T:
    """Return what `parse` makes of a field; raise CheckpointError naming the field otherwise."""
    try:
        return parse(value)
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


def _file(record: Any, save_id: str, arrays: tuple[str, ...], where: str) -> FileRecord:
    prefix = f"{where}: file record {str(record)[:80]!r}"
    if not isinstance(record, list) or len(record) != 4:
        raise CheckpointError(f"{prefix}: expected name, size, ranges and checksums")
    name, size, ranges, checksums = record
    match = SHARD_FILE.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] != save_id:
        raise CheckpointError(f"{prefix}: its name is not one that this save can have written")
    if not is_natural(size) or not isinstance(checksums, bytes):
        raise CheckpointError(f"{prefix}: its size must be a whole number, its checksums bytes")
    if len(checksums) != 8 * -(-size // CHUNK_BYTES):
        raise CheckpointError(
            f"{prefix}: {len(checksums)} bytes of checksums for {size} bytes, expected "
            f"{8 * -(-size // CHUNK_BYTES)}"
        )
    legal = isinstance(ranges, dict) and all(
        isinstance(r, list) and len(r) == 2 and all(map(is_natural, r)) and r[0] <= r[1]
        for r in ranges.values()
    )
    if not legal:
        raise CheckpointError(
            f"{prefix}: its ranges must be pairs of whole numbers, begin before end"
        )
    return FileRecord(
        name=name,
        size=size,
        ranges={space: (begin, end) for space, (begin, end) in ranges.items()},
        checksums=tuple(np.frombuffer(checksums, "<u8").tolist()),
        arrays=arrays,
    )
