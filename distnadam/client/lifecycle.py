"""Whether an optimizer is built or closed in this process, and what ends with it.

It owns the running shards and the save in flight; it knows no parameters and no steps.
"""

from collections.abc import Callable, Mapping
from typing import Any

from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.storage.base import Directory
from distnadam.checks import check_count
from distnadam.client.building import start_shards
from distnadam.client.checkpointing import CheckpointWriter
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Settings, changed_config
from distnadam.errors import ConfigError, LifecycleError, NotOpen
from distnadam.hyperparameters import NadamConfig
from distnadam.tensors.layout import Layout


class Lifecycle:
    """New, running, then closed.

    Args:
        settings: what the optimizer is asked to be.
    """

    def __init__(self, settings: Settings) -> None:
        self.saves = CheckpointWriter()
        self._settings = settings
        self._shards: ShardGroup | None = None
        self._is_creator = True
        self._closed = False
        self._leader: Lifecycle | None = None
        self._refusal: str | None = None

    def belong_to(self, run: Mapping[str, Any]) -> None:
        """Be of a run of `fit`, which checkpoints then say."""
        self._settings = self._settings.with_run(run)

    def follow(self, leader: "Lifecycle | None", refusal: str | None) -> None:
        """Have the hyper-parameters be another one's.

        Args:
            leader: the optimizer that a run of `fit` steps; None: none any more.
            refusal: why they cannot be set at this moment; None: they can.
        """
        self._leader = leader
        self._refusal = refusal

    def attach(self, shards: ShardGroup | None) -> None:
        """Take shards that run already, if any; closing leaves them alone."""
        if shards is None:
            return
        self._shards = shards
        self._is_creator = False

    @property
    def settings(self) -> Settings:
        """What the optimizer is asked to be, with as many shards as there are after a reshard."""
        shards = self._shards
        return self._settings if shards is None else self._settings.with_shards(len(shards.ranges))

    @property
    def is_built(self) -> bool:
        """Whether there are shards; raise LifecycleError if the optimizer is closed."""
        if self._closed:
            raise NotOpen("this optimizer was closed")
        return self._shards is not None

    @property
    def layout(self) -> Layout | None:
        """The model's layout, also of an optimizer that is closed; None before it is built."""
        return None if self._shards is None else self._shards.layout

    @property
    def shards(self) -> ShardGroup:
        """The running shards; raise LifecycleError if there are none yet, or no longer."""
        if not self.is_built or self._shards is None:
            raise NotOpen("this optimizer has no parameters yet: call build(params) first")
        return self._shards

    def shards_to_change(self) -> ShardGroup:
        """Return the shards; first raise the error of a background save that failed."""
        self.saves.surface()
        return self.shards

    def __str__(self) -> str:
        """What can be said without asking the shards."""
        settings, shards = self.settings, self._shards
        rate, topology = settings.config.lr, settings.topology
        state = "closed" if self._closed else "not built" if shards is None else "built"
        where = topology.backend if shards is None else shards.backend.name
        name = f" {topology.name!r}" if topology.name else ""
        words = [
            f"{state}{name}",
            f"lr={rate!r}" if not callable(rate) else f"lr={type(rate).__name__}",
            f"backend={where!r}",
            f"num_shards={topology.num_shards}",
            f"num_workers={topology.num_workers}",
        ]
        if shards is not None:
            tensors, elements = len(shards.layout.tensors), shards.layout.num_elements
            words.append(f"{tensors} tensors of {elements} elements")
        return ", ".join(words)

    def for_pickling(self) -> tuple[ShardGroup | None, Settings]:
        """Return what another process makes a handle of; raise LifecycleError if it cannot.

        There are no shards before it is built.
        """
        if not self.is_built:
            return None, self.settings
        if self.shards.backend.name == "local":
            raise LifecycleError(
                "a local optimizer lives in its process and cannot be copied or pickled; use "
                "backend='ray' to share it, or save and restore it"
            )
        return self.shards, self.settings

    def require_one_worker(self) -> None:
        """Raise LifecycleError if several workers have to push for themselves."""
        if self.num_workers != 1:
            raise LifecycleError(
                f"get_updates pushes for the only worker, and there are {self.num_workers}: use "
                "worker(rank) in each"
            )

    def check_rank(self, rank: int) -> None:
        """Raise ConfigError if there is no such rank."""
        if check_count("rank", rank, least=0) >= self.num_workers:
            raise ConfigError(f"rank must be in [0, {self.num_workers}), got {rank!r}")

    @property
    def num_workers(self) -> int:
        """The number of ranks."""
        return self._settings.topology.num_workers

    def start(self, layout: Layout, fill: Callable[[ShardGroup], None]) -> None:
        """Start the shards and fill them; end them again if that fails."""
        if self._closed:
            raise LifecycleError("this optimizer was closed; make a new one")
        if self._shards is not None:
            raise LifecycleError("this optimizer is built already")
        self._shards = start_shards(self._settings, layout)
        try:
            fill(self._shards)
        except BaseException:
            self.close()
            raise

    def restore(self, directory: Directory, manifest: Manifest) -> None:
        """Start the shards with a checkpoint's state."""
        layout = Layout.from_dict(manifest.layout)
        self.start(layout, lambda shards: shards.restore(directory, manifest))

    @property
    def config(self) -> NadamConfig:
        """The present hyper-parameters."""
        if self._leader is not None:
            return self._leader.config
        return self.shards.describe().config if self.is_built else self._settings.config

    def set_config(self, values: Mapping[str, Any]) -> None:
        """Change hyper-parameters, on every shard if there are any."""
        if not values:
            return
        if self._refusal is not None:
            raise LifecycleError(self._refusal)
        if self._leader is not None:
            self._leader.set_config(values)
            config = self._leader.config
        elif self.is_built:
            config = self.shards_to_change().set_config(values)
        else:
            config = changed_config(self._settings.config, values)
        self._settings = self._settings.with_config(config)

    def close(self) -> None:
        """Finish the save in flight and raise its error; end the shards that were started here."""
        if self._closed:
            return
        self._closed = True
        try:
            self.saves.finish()
        finally:
            if self._shards is not None:
                self._shards.backend.close(destroy=self._is_creator)
