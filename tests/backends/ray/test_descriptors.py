"""A run that needs more open files or shared memory than there is, is refused before it begins."""

import subprocess
import sys

from distnadam.planning.descriptors import needed

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


def test_too_few_descriptors_are_refused_before_ray_is_started() -> None:
    least = needed(num_workers=2, num_shards=3, replicas=0)
    assert (
        f"this host lets a process open {least - 1} files, and one of 2 workers with 3 shards and "
        f"0 standbys each may need {least}: raise the limit"
    ) in _refused(least - 1, 3, 0)


def test_a_store_larger_than_shared_memory_is_refused_before_ray_is_started() -> None:
    assert f"object_store_bytes={2**60}: /dev/shm has " in _refused(0, 1, 2**60)
