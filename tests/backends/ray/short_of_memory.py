"""A Ray of two nodes of this machine, of which the one for shards lies in a control group.

python -m tests.backends.ray.short_of_memory prints "held" if what does not fit there is refused.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from distnadam import DistNadam, Options
from distnadam.errors import InsufficientResources
from tests.control_groups import memory_group

MIB = 2**20
STORE = 800 * MIB  # no object goes to the disk, which may be full
FITS, LARGE = ({"w": np.ones(size, np.float32)} for size in (10**7, 10**8))
OPTIONS = Options(shard_resources={"shard": 1})


def of_node(raylet: int) -> list[int]:
    """Return a node's processes: its raylet and what that has started."""
    found = [raylet]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found += map(int, children)
    return found


def main() -> None:
    how = {"object_store_memory": STORE}
    head = {"num_cpus": 2, "include_dashboard": False} | how
    with memory_group() as group:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        node = cluster.add_node(num_cpus=0, resources={"shard": 9}, **how)
        (raylet,) = (each.process.pid for each in node.all_processes["raylet"])
        group.limit(1000 * MIB)
        group.add(of_node(raylet))
        ray.init(address=cluster.address, log_to_driver=False)
        where = rf"node \S+ \(id {node.node_id[:12]}\) has \d+ MiB of memory left and needs "
        with pytest.raises(
            InsufficientResources, match=f"{where}1526 MiB: 763 MiB for two buffers"
        ):
            DistNadam(num_shards=2, backend="ray", options=OPTIONS).build(LARGE)
        # some 60 MiB are those of a new process; the shard's state fits, its standby's does not
        group.limit(group.used() + (60 + 153 + 60) * MIB)
        with pytest.raises(
            InsufficientResources,
            match=rf"beside their shards, {where}115 MiB: 115 MiB for the state of a standby",
        ):
            DistNadam(replicas=1, backend="ray", options=OPTIONS).build(FITS)
        group.limit(1000 * MIB)
        with DistNadam(num_shards=1, backend="ray", options=OPTIONS).build(FITS) as one:
            one.apply_gradients(FITS)
            group.limit(group.used() + 160 * MIB)  # some 60 of them are those of a new process
            with pytest.raises(
                InsufficientResources, match=r"shard [01]: node .* for the state of"
            ):
                one.reshard(2)
            assert one.apply_gradients(FITS) == 2
            group.limit(1000 * MIB)
            one.reshard(2)
            assert one.apply_gradients(FITS) == 3
        ray.shutdown()
        cluster.shutdown()
    print("held", flush=True)


if __name__ == "__main__":
    assert os.environ["RAY_AUTH_MODE"]
    main()
