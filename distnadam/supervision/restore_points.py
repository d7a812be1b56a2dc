"""What all shards can go back to: the newest checkpoint that they can read, or the parameters given
to `build`; and what was replaced from outside since, which going back would lose.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import leftover_readers
from distnadam.checkpoint.storage.base import Directory
from distnadam.errors import CheckpointError, ConfigError
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.tensors.arrays import Flat, cut_flat

log = logging.getLogger("distnadam")


@dataclass(frozen=True, kw_only=True)
class RestorePoint:
    """One state to go back to: a checkpoint, or parameters with nothing behind them."""

    directory: Directory | None = None
    params: Flat | None = None

    def __str__(self) -> str:
        return "the first parameters" if self.directory is None else str(self.directory)


class RestorePoints:
    """The restore points of one optimizer. Any thread may call.

    Args:
        directory: where checkpoints are looked for; None: where the last one was saved.
        retain_initial: whether parameters are kept until there is a checkpoint.
    """

    def __init__(self, directory: str | None, *, retain_initial: bool) -> None:
        self._fixed = directory
        self._retain_initial = retain_initial
        self.directory = directory
        self.initial: Flat | None = None
        self.changed: str | None = None
        self.generation = 0

    @property
    def present(self) -> bool:
        """Whether there is anything to go back to."""
        return self.initial is not None or self.directory is not None

    def begin(self, initial: Flat | None, directory: str | None) -> None:
        """Remember what the shards began with, as far as it is known."""
        if initial is not None and self._retain_initial:
            self.initial = initial
        self.directory = self._fixed or directory or self.directory

    def state_replaced(self, what: str) -> None:
        """Remember that the state is about to be replaced from outside."""
        self.changed = what
        self.generation = max(time.time_ns(), self.generation + 1)

    def checkpoint_saved(self, root: str, generation: int) -> None:
        """Remember that a checkpoint of that generation of the state is complete.

        It holds whatever was replaced before it, and makes the first parameters needless, if it is
        where checkpoints are looked for.
        """
        if self._fixed not in (None, root):
            return
        self.directory = root
        self.initial = None
        if generation == self.generation:
            self.changed = None

    def candidates(self) -> Iterator[RestorePoint]:
        """Yield what could be loaded, best first."""
        if self.directory is not None:
            try:
                for step in store.newest_first(self.directory):
                    yield RestorePoint(directory=step)
            except CheckpointError as error:
                log.warning("cannot look for checkpoints: %s", error)
        if self.initial is not None:
            yield RestorePoint(params=self.initial)

    def loads(self, point: RestorePoint, specs: Sequence[ShardSpec], load: Load) -> dict[int, Load]:
        """Return the message that has each shard load its part; empty if the point is refused.

        Args:
            point: what to go back to.
            specs: the shards', in order.
            load: what all of them are sent, to be completed by the state; with the hyper-parameters
                that were seen last, which are the point's where a checkpoint says the same: their
                schedules may be of classes that this process cannot import.
        """
        if point.directory is None:
            params = point.params or {}
            return {
                index: replace(load, params=cut_flat(params, spec.ranges), config=spec.config)
                for index, spec in enumerate(specs)
            }
        try:
            manifest = store.load(point.directory)
            store.check_files(point.directory, manifest)
            config = _config_of(manifest, load.config, str(point))
        except CheckpointError as error:
            log.warning("passing over %s", error)
            return {}
        raw, leftovers = manifest.to_bytes(), leftover_readers(manifest, len(specs))
        return {
            index: replace(
                load,
                directory=point.directory.place,
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
