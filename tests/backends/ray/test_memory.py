"""Processes that may not have the memory they need: each says so by name, and what runs goes on
with its last good state.
"""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import OutOfMemory
from distnadam.nadam.fused import load_loop
from tests.models import bits

START = {"w": np.linspace(-1, 1, 2**24, dtype=np.float32)}

SHORT = """
import json, os, re, resource, sys
import numpy as np

def limit(room):
    used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

def main():
    from distnadam import DistNadam
    from distnadam.errors import OutOfMemory

    small, big = {"w": np.ones(1000, np.float32)}, {"w": np.ones(2**26, np.float32)}
    room = int(sys.argv[2])
    if sys.argv[1] == "local":
        limit(room)
    else:
        import ray
        env = {"worker_process_setup_hook": lambda: limit(room)}
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            runtime_env=env,
        )
    result = {}
    with DistNadam(num_shards=2, backend=sys.argv[1]).build(small) as first:
        first.apply_gradients(small)
        second = DistNadam(num_shards=2, backend=sys.argv[1])
        try:
            second.build(big)
        except OutOfMemory as error:
            result["error"] = str(error)
        second.close()
        first.apply_gradients(small)
        result["iterations"] = first.iterations
    print(json.dumps(result))

main()
"""


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=[pytest.mark.nightly])])
def test_a_model_that_a_process_cannot_hold_is_refused_and_another_optimizer_goes_on(
    backend: str,
) -> None:
    """Room for the parameters' buffers, of 2 x 256 MiB, and not for the moments too.

    A local optimizer maps them twice, for shards and for workers.
    """
    room = 1612 * 2**20 if backend == "local" else 600 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", SHORT, backend, str(room)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert re.match(
        r"shard [01]: its state of \d+ bytes: Unable to allocate 128. MiB", result["error"]
    ), result
    assert result["iterations"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere LLVM links the code")
@pytest.mark.usefixtures("ray_cluster")
def test_a_shards_process_has_no_compiler_in_memory_once_the_step_is_compiled() -> None:
    load_loop("float32")
    small, options = {"w": np.ones(1000, np.float32)}, Options(kernel="fused")
    with DistNadam(backend="ray", options=options).build(small) as optimizer:
        optimizer.apply_gradients(small)
        maps = Path(f"/proc/{optimizer.shards.backend.addresses[0].pid}/maps").read_text()
    mapped = {Path(line.split(maxsplit=5)[-1]).name for line in maps.splitlines()}
    assert [name for name in mapped if re.search("llvm|numba", name)] == []
    assert any("distnadam-code" in name for name in mapped), "the step, kept by this process"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_without_the_memory_for_a_snapshot_goes_on_and_saves_once_it_has_it(
    tmp_path: Path,
) -> None:
    with DistNadam(num_shards=1, backend="ray").build(START) as optimizer:
        optimizer.apply_gradients(START)
        pid = optimizer.shards.backend.addresses[0].pid
        limits = resource.prlimit(pid, resource.RLIMIT_AS)
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(pid, resource.RLIMIT_AS, (used + 40 * 2**20, limits[1]))
        with pytest.raises(OutOfMemory, match=r"shard 0: a copy of its state: Unable to allocate"):
            optimizer.save(tmp_path, wait=False)
        resource.prlimit(
            pid, resource.RLIMIT_AS, limits
        )  # before Ray's own core needs memory, which dies without
        before = bits(optimizer)
        optimizer.save(tmp_path, wait=False)
        assert optimizer.apply_gradients(START) == 2
    with DistNadam.restore(tmp_path, backend="local") as restored:
        assert bits(restored) == before
