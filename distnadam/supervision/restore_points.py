"""What all shards can go back to: checkpoints of this optimizer, or the parameters given to
`build`; and what was replaced from outside since, which going back would lose.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import msgpack

from distnadam.checkpoint import store
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import leftover_readers
from distnadam.errors import CheckpointError, ConfigError
from distnadam.hyperparameters import NadamConfig
from distnadam.places import above, shown
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.tensors.arrays import Flat, cut_flat

log = logging.getLogger("distnadam")

_MOST_KNOWN = 64
"""Checkpoints that are known at most: older ones are seldom kept, and never needed first."""


class RestoreMemory(Protocol):
    """Keeps a record of restore points for a supervisor's successor, whatever processes die."""

    def read(self) -> bytes | None:
        """Return what was written last; None if nothing was."""

    def write(self, record: bytes) -> None:
        """Keep a record in place of the last."""


@dataclass(frozen=True, kw_only=True)
class RestorePoint:
    """One state to go back to: a checkpoint, or parameters with nothing behind them.

    Args:
        checkpoint: which one; None for parameters.
        params: by space; None for a checkpoint.
        generation: that of `Replacements` whose state it holds.
    """

    checkpoint: CheckpointId | None = None
    params: Flat | None = None
    generation: int = 0

    def __str__(self) -> str:
        return "the first parameters" if self.checkpoint is None else shown(self.checkpoint.place)


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """What was replaced from outside.

    Args:
        begun: the generation of the state that the last replacement makes, answered or not.
        what: that replacement, in words.
        answered: the last generation whose author was told that it is there, or an earlier one.
        what_answered: that replacement, in words.
    """

    begun: int = 0
    what: str = ""
    answered: int = 0
    what_answered: str = ""


class RestorePoints:
    """The restore points of one optimizer. Any thread may call.

    Only what is known to be this optimizer's own is a restore point, whatever else lies in the
    directory of checkpoints: it may be of another run, or of before a replacement.

    Args:
        directory: where checkpoints must be to count; None: anywhere.
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
        self._points: tuple[RestorePoint, ...] = ()  # the last one last
        self._replacements = Replacements()
        record = None if memory is None else memory.read()
        if record is not None:
            points, replacements = msgpack.unpackb(record)
            self._points = tuple(
                RestorePoint(checkpoint=CheckpointId(place, save_id), generation=generation)
                for place, save_id, generation in points
            )
            self._replacements = Replacements(**replacements)

    @property
    def present(self) -> bool:
        """Whether there is anything to go back to."""
        return bool(self._points)

    @property
    def generation(self) -> int:
        """The generation of the present state, which every replacement raises."""
        return self._replacements.begun

    @property
    def changed(self) -> str | None:
        """What going back would lose; None: nothing."""
        now = self._replacements
        return None if self._holds(now.begun) else now.what

    @property
    def changed_before(self) -> str | None:
        """What going back would lose beside the last replacement, if that was never answered."""
        now = self._replacements
        return None if self._holds(now.answered) else now.what_answered

    def _holds(self, generation: int) -> bool:
        return generation == 0 or any(each.generation >= generation for each in self._points)

    def begin(self, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        """Remember what the shards began with, as far as it is known."""
        params = initial if self._retain_initial else None
        with self._lock:
            if not self._points and (params is not None or checkpoint is not None):
                point = RestorePoint(checkpoint=checkpoint, params=params)
                self._keep(self._replacements, (point,))

    def replacement_begun(self, what: str) -> None:
        """Remember that the state is about to be replaced from outside."""
        with self._lock:
            now = self._replacements
            begun = max(time.time_ns(), now.begun + 1)
            self._keep(replace(now, begun=begun, what=what), self._points)

    def replacement_answered(self) -> None:
        """Remember that all shards have what was replaced last."""
        with self._lock:
            now = self._replacements
            if now.answered < now.begun:
                whole = replace(now, answered=now.begun, what_answered=now.what)
                self._keep(whole, self._points)

    def checkpoint_saved(self, checkpoint: CheckpointId, generation: int) -> None:
        """Remember that a checkpoint of that generation of the state is complete.

        It holds whatever was replaced before it, and makes what is of before that needless, if it
        is where checkpoints count.
        """
        if self._fixed not in (None, above(checkpoint.place)):
            return
        point = RestorePoint(checkpoint=checkpoint, generation=generation)
        with self._lock:
            others = [
                each
                for each in self._points
                if each.checkpoint is not None and each.checkpoint.place != checkpoint.place
            ]
            before = [each for each in others if each.generation == generation]
            after = [each for each in others if each.generation > generation]
            self._keep(self._replacements, [*before, point, *after][-_MOST_KNOWN:])

    def gone_back(self, point: RestorePoint) -> None:
        """Remember that all shards have this state now."""
        with self._lock:
            if (generation := point.generation) < self.generation:
                self._keep(Replacements(begun=generation, answered=generation), self._points)

    def _keep(self, replacements: Replacements, points: Sequence[RestorePoint]) -> None:
        """Know this from now on, once it is in the memory."""
        if self._memory is not None:
            listed = [(*each.checkpoint, each.generation) for each in points if each.checkpoint]
            self._memory.write(msgpack.packb([listed, vars(replacements)]))
        self._replacements, self._points = replacements, tuple(points)

    def candidates(self, *, undoing: bool = False) -> Iterator[RestorePoint]:
        """Yield what may be loaded, best first: what loses nothing that was replaced.

        Args:
            undoing: whether the last replacement was half done, and may be lost.
        """
        now = self._replacements
        least = now.answered if undoing else now.begun
        for point in reversed(self._points):
            if point.generation >= least:
                yield point

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
