"""A run that needs more open files or shared memory than there is, is refused before it begins."""

import subprocess
import sys

import pytest

from distnadam.planning.descriptors import needed, of_relay, of_shard

SCRIPT = """
import resource
import sys
import numpy as np
import ray
from distnadam import DistNadam, Options
from distnadam.errors import InsufficientResources

limit, shards, store = map(int, sys.argv[1:])
if limit:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
options = Options(object_store_bytes=store or None)
try:
    optimizer = DistNadam(num_workers=2, num_shards=shards, backend="ray", options=options)
    optimizer.build({"w": np.ones(9, np.float32)})
except InsufficientResources as error:
    assert not ray.is_initialized()
    print(error)
"""


def _refused(limit: int, shards: int, store: int) -> str:
    command = [sys.executable, "-c", SCRIPT, str(limit), str(shards), str(store)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("shards", [3, 40])
def test_too_few_descriptors_are_refused_before_ray_is_started(shards: int) -> None:
    """The more shards there are, the more a relay has open rather than a shard."""
    shard, relay = of_shard(2, shards, 0), of_relay(2, shards)
    assert needed(2, shards, 0) == max(shard, relay) == (shard if shards == 3 else relay)
    least = max(shard, relay)
    assert (
        f"this host lets a process open {least - 1} files, and of 2 workers with {shards} shards "
        f"and 0 standbys each, a shard may need {shard}, and a relay beside all workers {relay}: "
        "raise the limit"
    ) in _refused(least - 1, shards, 0)


def test_a_store_larger_than_shared_memory_is_refused_before_ray_is_started() -> None:
    assert f"object_store_bytes={2**60}: /dev/shm has " in _refused(0, 1, 2**60)
