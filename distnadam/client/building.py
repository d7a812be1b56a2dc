"""Starting an optimizer's shards: from its settings, from a checkpoint's, or from a running one's.

It knows which backend is meant and what each shard is; it puts no state into them.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distnadam.backends import factory
from distnadam.checkpoint import store
from distnadam.checkpoint.contents import check_layout
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.storage.base import Directory
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options, Settings, Topology
from distnadam.errors import ConfigError, DistNadamError
from distnadam.groups import groups_of
from distnadam.protocol.messages import ShardSpec
from distnadam.tensors.layout import Layout
from distnadam.tensors.leaves import tied
from distnadam.waiting import said_if_long

log = logging.getLogger("distnadam")

_SAVED = ("num_shards", "num_workers", "replicas", "name")
"""What a checkpoint's topology decides unless something else is asked for."""


def start_shards(settings: Settings, layout: Layout) -> ShardGroup:
    """Return new shards of a model, without state yet.

    Raises:
        StructureError: no checkpoint has room for the model's names.
        ConfigError: a local optimizer cannot have a name, or a group has no tensor.
        ClusterError: the shards cannot be obtained.
    """
    check_layout(layout)
    check_can_start(settings)
    config = settings.config
    groups = groups_of(config.groups, [tensor.path for tensor in layout.tensors])
    still = {number for number, group in enumerate(config.groups) if not group.trainable}
    frozen = (index for index, group in enumerate(groups) if group in still)
    layout = layout.for_workers(config.pull_dtype, frozen, may_lack=config.clocks == "tensor")
    topology = settings.topology
    backend = factory.choose(topology.backend, several=topology.several)
    specs = [
        ShardSpec(
            index=index,
            num_shards=topology.num_shards,
            num_workers=topology.num_workers,
            replicas=topology.replicas,
            name=topology.name,
            config=settings.config,
            options=settings.options,
            layout=layout,
            ranges=ranges,
            run=settings.run,
        )
        for index, ranges in enumerate(layout.cuts(topology.num_shards))
    ]
    backend.start(specs, topology.replicas)
    return ShardGroup(backend, layout, settings.options)


def check_can_start(settings: Settings) -> None:
    """Raise ConfigError for settings that no backend of theirs can have."""
    topology = settings.topology
    backend = factory.resolve(topology.backend, several=topology.several)
    if topology.name is not None and backend == "local":
        raise ConfigError(
            f"name={topology.name!r} needs backend='ray': a local optimizer cannot be connected to"
        )


def warn_of_tied(layout: Layout, params: Any) -> None:
    """Warn the caller of `build` of tensors of its tree that are one array with another."""
    paths = [tensor.path for tensor in layout.tensors]
    shared = tied(paths, layout.leaves_as_given(params, what="params"))
    if shared:
        pairs = ", ".join(f"{path!r} is {first!r}" for path, first in list(shared.items())[:3])
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        warnings.warn(
            f"params: one array was given under two paths ({pairs}{more}): each path is a "
            "parameter of its own from here on, and they part where their gradients differ; to "
            "keep them tied, give the array under one path and use it in both places; to keep them "
            "apart, give a copy",
            stacklevel=3,
        )


def running(name: str) -> tuple[ShardGroup, Settings]:
    """Return the shards of a running optimizer once they have begun, and its settings.

    Raises:
        NotRunning: there is none.
        StepTimeout: whoever started the shards does not give them what they begin with.
    """
    backend, spec = factory.connect(name)
    shards = ShardGroup(backend, spec.layout, spec.options)
    _await_first_state(shards, name)
    return shards, settings_of(spec)


class _NotBegun(DistNadamError):
    """A shard has no state yet."""


def _await_first_state(shards: ShardGroup, name: str) -> None:
    """Wait until whoever starts shards has given them a state: until then they answer with zeros,
    and what is pushed to them is lost.
    """

    def look() -> None:
        if any(shard.epoch == 0 for shard in shards.describe_all()):
            raise _NotBegun

    def whom() -> str:
        return f"for whoever builds it to give the shards their state: {shards.reports.busy()}"

    with said_if_long(f"connecting to {name!r}", whom, shards.options.step_timeout_s):
        problem = (
            f"connecting to {name!r}: whoever builds it (`distnadam stop {name}` ends what is left "
            "of it) did not give the shards their state"
        )
        shards.retry.poll(look, problem, until_not=_NotBegun)


def settings_of(spec: ShardSpec) -> Settings:
    """Return the settings of the running optimizer that a shard is part of."""
    topology = Topology(
        num_shards=spec.num_shards,
        num_workers=spec.num_workers,
        replicas=spec.replicas,
        backend="ray",
        name=spec.name,
    )
    return Settings(config=spec.config, options=spec.options, topology=topology, run=spec.run)


def restored_settings(
    directory: Directory, manifest: Manifest, asked: Mapping[str, Any], options: Options | None
) -> Settings:
    """Return a checkpoint's settings, with what is asked for in place of what was saved.

    Args:
        directory: the checkpoint's.
        manifest: the checkpoint's.
        asked: arguments of `Topology`; None means as saved, or "auto" for the backend.
        options: None means as saved.

    Raises:
        CheckpointError: the checkpoint's own settings are refused.
        ConfigError: what is asked for cannot be.
    """
    values = {key: manifest.topology[key] for key in _SAVED}
    values |= {key: value for key, value in asked.items() if value is not None}
    topology = Topology(**values)
    is_local = factory.resolve(topology.backend, several=topology.several) == "local"
    # a name that was saved is of no use to a local optimizer; one that is asked for is refused
    if topology.backend == "local" or (is_local and not asked.get("name")):
        if topology.name and topology.backend != "local":
            log.warning(
                "%s: restored without its name %r, as a local optimizer: no Ray runs here",
                directory,
                topology.name,
            )
        topology = replace(topology, name=None)
    return Settings(
        config=manifest.nadam_config(f"{directory}/{store.MANIFEST}"),
        options=manifest.saved_options if options is None else Options.of(options),
        topology=topology,
        run=manifest.run,
    )
