"""What all shards can go back to: checkpoints of this optimizer, or the parameters given to
`build`; and what was replaced from outside since, which going back would lose.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import msgpack

from distnadam.checkpoint import store
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import leftover_readers
from distnadam.errors import CheckpointError, ConfigError, DistNadamError, StaleEpoch
from distnadam.hyperparameters import NadamConfig
from distnadam.places import above, shown
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.supervision.known_points import KnownPoints, RestorePoint
from distnadam.tensors.arrays import Flat, cut_flat

log = logging.getLogger("distnadam")

_MOST_KNOWN = 64
"""The most checkpoints to remember; `store.prune` has usually removed older ones."""


class RestoreMemory(Protocol):
    """Keeps a record of restore points for a supervisor's successor, whatever processes die."""

    def read(self) -> bytes | None:
        """Return what was written last; None if nothing was."""

    def write(self, record: bytes) -> None:
        """Keep a record in place of the last."""


class RestorePoints:
    """The restore points of one optimizer. Any thread may call; what is to be decided and done by
    several calls takes `known` once.

    Only checkpoints that it was told of count, whatever else lies in their directory: that may be
    of another run, or from before a replacement.

    Args:
        directory: where saved checkpoints must be to count; None: anywhere.
        retain_initial: whether parameters are kept until there is a checkpoint.
        memory: keeps all of it but the parameters for a successor; None where there is none.
    """

    def __init__(
        self, directory: str | None, *, retain_initial: bool, memory: RestoreMemory | None = None
    ) -> None:
        self._fixed = directory
        self._retain_initial = retain_initial
        self._memory = memory
        self._lock = threading.Lock()
        self.known = KnownPoints()
        if memory is not None and (record := memory.read()) is not None:
            listed, fields = msgpack.unpackb(record)
            points = (
                RestorePoint(checkpoint=CheckpointId(*where), taken=taken, is_whole=is_whole)
                for where, taken, is_whole in listed
            )
            self.known = KnownPoints(points=tuple(points), **fields)

    def begin(self, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        """Remember what the shards began with, as far as it is known."""
        params = initial if self._retain_initial else None
        with self._lock:
            if not self.known.points and (params is not None or checkpoint is not None):
                now = self.known.now + 1
                point = RestorePoint(taken=now, checkpoint=checkpoint, params=params)
                self._keep(now=now, points=(point,))

    def replacement_begun(self, what: str) -> int:
        """Remember that the state is about to be replaced from outside; return when."""
        with self._lock:
            known, now = self.known, self.known.now + 1
            half_done = known.half_done if known.begun > known.completed else now
            self._keep(now=now, begun=now, half_done=half_done, what=what)
            return now

    def replacement_completed(self, begun: int) -> None:
        """Remember that all shards have what was replaced.

        Raises:
            StaleEpoch: they went back since, or another replacement has begun.
        """
        with self._lock:
            known = self.known
            if begun < known.went_back or begun not in (known.begun, known.completed):
                raise StaleEpoch("all shards went back, or were replaced by another, meanwhile")
            if known.completed < begun:
                self._keep(completed=begun, what_completed=known.what)

    def snapshot_taken(self) -> int:
        """Return when the present state is taken, which all shards are held for."""
        with self._lock:
            self._keep(now=self.known.now + 1)
            return self.known.now

    def checkpoint_written(self, checkpoint: CheckpointId, taken: int, *, is_whole: bool) -> None:
        """Remember a checkpoint of a snapshot whose files are written, and then that it is whole.

        It holds whatever was replaced before it, and drops the points that it supersedes, if it is
        where checkpoints count.

        Raises:
            CheckpointError: all shards went back since the snapshot, and it has no manifest yet.
        """
        with self._lock:
            places = {each.checkpoint.place for each in self.known.points if each.checkpoint}
            if (
                self._fixed not in (None, above(checkpoint.place))
                and checkpoint.place not in places
            ):
                return
            if taken < self.known.went_back and not is_whole:
                raise CheckpointError(
                    f"{shown(checkpoint.place)}: all shards went back since then; save again"
                )
            if taken < self.known.went_back:
                return
            told = [each for each in self.known.points if each.checkpoint == checkpoint]
            points = [each for each in self.known.points if each.checkpoint != checkpoint]
            is_whole = is_whole or any(each.is_whole for each in told)  # told late, once more
            point = RestorePoint(taken=taken, checkpoint=checkpoint, is_whole=is_whole)
            if is_whole:
                points = [each for each in points if not self._is_superseded(each, point)]
            points.append(point)
            points.sort(key=lambda point: point.taken)
            self._keep(points=tuple(points[-_MOST_KNOWN:]))

    def _is_superseded(self, point: RestorePoint, by: RestorePoint) -> bool:
        """Whether a point is of no use beside a whole checkpoint."""
        if point.checkpoint is None or by.checkpoint is None:
            return True
        is_replaced = point.checkpoint.place == by.checkpoint.place and point.taken < by.taken
        return is_replaced or point.taken < self.known.completed < by.taken

    def gone_back(self, point: RestorePoint) -> str | None:
        """Remember that all shards have this state now; return what that has lost, in words.

        A replacement that is not completed by now is void, and never will be: whoever held the
        shards for it holds them no more.
        """
        with self._lock:
            known, now = self.known, self.known.now + 1
            if known.completed > point.taken:
                return known.what_completed
            points = tuple(each for each in known.points if each.taken <= point.taken)
            changes: dict[str, Any] = {"now": now, "went_back": now, "points": points}
            if point.taken < known.begun:
                changes |= {"begun": known.completed, "what": known.what_completed}
            try:
                self._keep(**changes)
            except DistNadamError as error:  # the record is too strict: a successor refuses
                log.warning("%s", error)
                self.known = replace(known, **changes)
        return None

    def _keep(self, **changes: Any) -> None:
        """Know this from now on, once it is in the memory."""
        known = replace(self.known, **changes)
        if self._memory is not None:
            listed = [
                (each.checkpoint, each.taken, each.is_whole)
                for each in known.points
                if each.checkpoint is not None
            ]
            fields = {name: value for name, value in vars(known).items() if name != "points"}
            self._memory.write(msgpack.packb([listed, fields]))
        self.known = known

    def loads(self, point: RestorePoint, specs: Sequence[ShardSpec], load: Load) -> dict[int, Load]:
        """Return the message that has each shard load its part; empty if the point is refused.

        Args:
            point: what to go back to.
            specs: the shards', in order.
            load: what all of them are sent, to be completed by the state; with the hyper-parameters
                that were seen last, which are the point's where a checkpoint says the same: their
                schedules may be of classes that this process cannot import.
        """
        if point.checkpoint is None:
            params = point.params or {}
            return {
                index: replace(load, params=cut_flat(params, spec.ranges), config=spec.config)
                for index, spec in enumerate(specs)
            }
        try:
            place, save_id = point.checkpoint
            manifest = store.load(place)
            if manifest.save_id != save_id:
                raise CheckpointError(f"{point}: is save {manifest.save_id}, expected {save_id}")
            store.check_files(place, manifest)
            config = _config_of(manifest, load.config, str(point))
        except (CheckpointError, ConfigError) as error:
            log.warning("passing over %s", error)
            return {}
        raw, leftovers = manifest.to_bytes(), leftover_readers(manifest, len(specs))
        return {
            index: replace(
                load,
                directory=place,
                manifest=raw,
                leftovers=tuple(left),
                config=config,
            )
            for index, left in enumerate(leftovers)
        }


def _config_of(manifest: Manifest, seen: NadamConfig | None, where: str) -> NadamConfig:
    """Return a checkpoint's hyper-parameters: the object given, if it is the same."""
    with suppress(ConfigError):  # of a plain function, which no checkpoint holds
        if seen is not None and seen.to_dict() == manifest.config:
            return seen
    return manifest.nadam_config(where)
