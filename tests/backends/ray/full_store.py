"""A Ray whose object store is small, and whose disk is full as Ray sees it.

python -m tests.backends.ray.full_store prints "held" if what has no room yet is sent once it has,
and what has none is refused by name.
"""

import os
import threading
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayError

from distnadam import DistNadam
from distnadam.errors import InsufficientResources

MIB = 2**20
FITS, LARGE = ({"w": np.ones(mib * MIB // 4, np.float32)} for mib in (20, 200))


def fill_the_store() -> list[Any]:
    """Put objects until there is no room for one of a MiB, and return what keeps them."""
    kept = []
    while True:
        try:
            kept.append(ray.put(np.zeros(MIB, np.uint8)))
        except RayError:
            return kept


def main() -> None:
    how = {"address": "local", "num_cpus": 4, "include_dashboard": False, "log_to_driver": False}
    ray.init(object_store_memory=80 * MIB, **how)
    with DistNadam(num_shards=2, backend="ray").build(FITS) as optimizer:
        optimizer.apply_gradients(FITS)
        kept = fill_the_store()
        threading.Timer(1.0, kept.clear).start()
        assert optimizer.apply_gradients(FITS) == 2
        assert not kept, "it waited"
    refused = r"shard [01]: Ray's object store has no room for .* a larger store"
    with pytest.raises(InsufficientResources, match=refused):
        DistNadam(num_shards=2, backend="ray").build(LARGE)
    ray.shutdown()
    print("held", flush=True)


if __name__ == "__main__":
    assert os.environ["RAY_AUTH_MODE"]
    main()
