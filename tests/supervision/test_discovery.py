"""What a successor makes of the processes it finds: the present layout generation, and which
process is what in it.
"""

from typing import Any

import numpy as np
import pytest

from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.discovery import DiscoveredProcess, recovered_topology
from distnadam.supervision.process_manager import ShardProcess
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"w": np.zeros(5000, np.float32)})


def spec(layout_generation: int, count: int, index: int = 0) -> ShardSpec:
    return ShardSpec(
        index=index,
        num_shards=count,
        num_workers=1,
        replicas=0,
        name="name",
        config=NadamConfig(),
        options=Options(),
        layout=LAYOUT,
        ranges=LAYOUT.cuts(count)[index],
        run_id="run",
        layout_generation=layout_generation,
    )


def discovered(layout_generation: int, count: int, index: int, **how: Any) -> DiscoveredProcess:
    kind = "standby" if how.get("standby") else "shard"
    return DiscoveredProcess(
        process=ShardProcess(index, f"{kind} {layout_generation}.{index}", None),
        spec=spec(layout_generation, count, index),
        **({"epoch": 1} | how),
    )


OLD = [discovered(0, 2, 0), discovered(0, 2, 1)]
NEW = [discovered(1, 3, i, epoch=2) for i in range(3)]
RETIRED = [discovered(0, 2, 0, retired=True, epoch=2), discovered(0, 2, 1, retired=True, epoch=2)]
EMPTY = [discovered(1, 3, i, epoch=0) for i in range(3)]


@pytest.mark.parametrize(
    ("found", "count", "shards"),
    [
        (OLD, 2, ["shard 0.0", "shard 0.1"]),
        (OLD[1:], 2, ["shard 0.1"]),
        ([], 2, []),
        (OLD + EMPTY, 2, ["shard 0.0", "shard 0.1"]),
        (OLD + EMPTY[:1], 2, ["shard 0.0", "shard 0.1"]),
        (OLD + NEW, 2, ["shard 0.0", "shard 0.1"]),
        (OLD[:1] + NEW, 2, ["shard 0.0"]),
        (RETIRED[:1] + OLD[1:] + NEW, 2, ["shard 0.1"]),
        (RETIRED + NEW, 3, ["shard 1.0", "shard 1.1", "shard 1.2"]),
        (RETIRED[:1] + NEW[1:], 3, ["shard 1.1", "shard 1.2"]),
        (NEW[:1], 3, ["shard 1.0"]),
        (EMPTY, 3, ["shard 1.0", "shard 1.1", "shard 1.2"]),
    ],
    ids=[
        "before any reshard",
        "one died",
        "all died",
        "the new ones had no state yet",
        "not all new ones were there",
        "the new ones had theirs, the old ones were not retired",
        "and one of the old ones died",
        "retired in part",
        "retired",
        "retired, some died",
        "the old ones are gone, some died",
        "none has a state",
    ],
)
def test_the_present_layout_is_the_oldest_that_still_holds_its_state(
    found: list[DiscoveredProcess], count: int, shards: list[str]
) -> None:
    after = recovered_topology(spec(0, 2), found)
    assert [s.num_shards for s in after.specs] == [count] * count
    assert [s.ranges for s in after.specs] == LAYOUT.cuts(count)
    assert [after.shards[index].handle for index in sorted(after.shards)] == shards
    taken = {*after.shards.values(), *after.standbys.values()}
    assert {*after.spare} == {each.process for each in found} - taken


def test_of_two_processes_for_one_shard_the_one_with_a_state_is_taken() -> None:
    filled = discovered(0, 2, 0, standby=True, reached=7)
    empty = DiscoveredProcess(
        process=ShardProcess(0, "another standby", None), spec=spec(0, 2), standby=True
    )
    new = DiscoveredProcess(process=ShardProcess(0, "a new shard", None), spec=spec(0, 2), epoch=0)
    after = recovered_topology(spec(0, 2), [*OLD, filled, empty, new])
    assert after.standbys == {0: filled.process}
    assert after.shards[0] == OLD[0].process
    assert set(after.spare) == {empty.process, new.process}
