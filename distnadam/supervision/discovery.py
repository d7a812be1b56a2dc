"""How a supervisor's successor sorts the processes that it finds: which layout generation is the
present one, and which process is what in it. Pure.

A reshard starts the new shards, has them load what the old ones hold, retires the old ones, and
only then publishes a map. So while an old shard answers and is not retired, it holds the present
state, and no client knows of the new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.process_manager import ShardProcess


@dataclass(frozen=True, kw_only=True)
class DiscoveredProcess:
    """A process that answered.

    Args:
        process: the process.
        spec: its shard's.
        standby: whether it is a standby.
        epoch: the shard's epoch; 0 before it had a state.
        retired: whether other shards hold its ranges.
        reached: the last round that a standby has; None if it has no state.
    """

    process: ShardProcess
    spec: ShardSpec
    standby: bool = False
    epoch: int = 0
    retired: bool = False
    reached: int | None = None


@dataclass(frozen=True, kw_only=True)
class RecoveredTopology:
    """What a successor supervises.

    Args:
        specs: of all shards, in order, dead ones too.
        shards: the shards that were found, by index.
        standbys: the standbys that were found, by index.
        spare: processes that nobody needs.
    """

    specs: tuple[ShardSpec, ...]
    shards: dict[int, ShardProcess]
    standbys: dict[int, ShardProcess]
    spare: tuple[ShardProcess, ...]


def recovered_topology(
    first: ShardSpec, discovered: Sequence[DiscoveredProcess]
) -> RecoveredTopology:
    """Sort processes.

    Args:
        first: the spec of shard 0 as the optimizer was built, which counts if no process was found.
        discovered: the processes that answered.
    """
    layout_generation = _present_generation(discovered, first.layout_generation)
    present = [each for each in discovered if each.spec.layout_generation == layout_generation]
    spec = present[0].spec if present else first
    cuts = spec.cuts or spec.layout.cuts(spec.num_shards)
    specs = tuple(replace(spec, index=index, ranges=ranges) for index, ranges in enumerate(cuts))
    primaries = sorted(
        (each for each in present if not each.standby and not each.retired),
        key=lambda each: each.epoch,
    )
    shards = {each.process.index: each.process for each in primaries}
    standbys = {
        each.process.index: each.process
        for each in sorted(present, key=lambda each: -1 if each.reached is None else each.reached)
        if each.standby
    }
    taken = [*shards.values(), *standbys.values()]
    return RecoveredTopology(
        specs=specs,
        shards=shards,
        standbys=standbys,
        spare=tuple(each.process for each in discovered if each.process not in taken),
    )


def _present_generation(discovered: Sequence[DiscoveredProcess], otherwise: int) -> int:
    holding = [
        each.spec.layout_generation
        for each in discovered
        if not each.standby and each.epoch > 0 and not each.retired
    ]
    if holding:
        return min(holding)
    return max((each.spec.layout_generation for each in discovered), default=otherwise)
