"""How a supervisor's successor sorts the processes that it finds: which cutting of the state is the
present one, and who is who in it.

A reshard makes the new shards first, has them load what the old ones hold, retires the old ones,
and only then tells anyone. So as long as one of the old ones answers and is not retired, it holds
the present state, and nobody knows of the new ones. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.process_manager import ShardProcess


@dataclass(frozen=True)
class DiscoveredProcess:
    """A process that answered.

    Args:
        hired: the process.
        spec: its shard's.
        standby: whether it is one.
        epoch: the shard's, 0 before it had a state.
        retired: whether it was told that others hold its ranges.
        reached: the round that a standby has followed its primary to, None where it was not filled.
    """

    process: ShardProcess
    spec: ShardSpec
    standby: bool = False
    epoch: int = 0
    retired: bool = False
    reached: int | None = None


@dataclass(frozen=True)
class RecoveredTopology:
    """The shards and standbys that are taken over, by index, the specs of all shards, and the
    processes that nobody needs.
    """

    specs: tuple[ShardSpec, ...]
    shards: dict[int, ShardProcess]
    standbys: dict[int, ShardProcess]
    spare: tuple[ShardProcess, ...]


def recovered_topology(
    first: ShardSpec, discovered: Sequence[DiscoveredProcess]
) -> RecoveredTopology:
    """Sort processes; `first` is the spec of the first shard that the optimizer was built with,
    which counts where nobody knows better.
    """
    layout_generation = _present(discovered, first.layout_generation)
    present = [each for each in discovered if each.spec.layout_generation == layout_generation]
    spec = present[0].spec if present else first
    cuts = spec.layout.cuts(spec.num_shards)
    specs = tuple(replace(spec, index=index, ranges=ranges) for index, ranges in enumerate(cuts))
    primaries = sorted(
        (each for each in present if not each.standby and not each.retired),
        key=lambda each: each.epoch,
    )
    shards = {each.process.index: each.process for each in primaries}
    standbys = {
        each.process.index: each.process
        for each in sorted(present, key=lambda each: each.reached is not None)
        if each.standby
    }
    taken = [*shards.values(), *standbys.values()]
    return RecoveredTopology(
        specs,
        shards,
        standbys,
        tuple(each.process for each in discovered if each.process not in taken),
    )


def _present(discovered: Sequence[DiscoveredProcess], otherwise: int) -> int:
    holding = [
        each.spec.layout_generation
        for each in discovered
        if not each.standby and each.epoch > 0 and not each.retired
    ]
    if holding:
        return min(holding)
    return max((each.spec.layout_generation for each in discovered), default=otherwise)
