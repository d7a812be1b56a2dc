"""A process whose Ray is gone, or that was forked from one that had joined it: one sentence, no
second Ray, and at once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import os, signal, sys, tempfile
import numpy as np, ray
from distnadam import DistNadam
from distnadam.errors import LifecycleError, RayLost
{start}
params = {"w": np.ones(50, np.float32)}
optimizer = DistNadam(backend="ray", num_workers=1).build(params)
worker = optimizer.worker(0)
worker.step(params)
optimizer.apply_gradients(params)

def refused(told, kind=LifecycleError):
    for number, call in enumerate((
        lambda: optimizer.iterations,
        lambda: optimizer.lr,
        optimizer.get_params,
        optimizer.get_weights,
        lambda: optimizer.set_params(params),
        lambda: optimizer.apply_gradients(params),
        lambda: optimizer.save(tempfile.mkdtemp()),
        lambda: optimizer.save(tempfile.mkdtemp(), wait=False),
        lambda: optimizer.reshard(2),
        optimizer.waiting_for,
        optimizer.lost_ranks,
        lambda: optimizer.team(lambda rank: rank),
        lambda: optimizer.shards.backend.hosts(),
        lambda: optimizer.worker(0).step(params),
        lambda: worker.step(params),
        worker.pull,
    )):
        try:
            call()
        except kind as error:
            assert told in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError(f"call {number} was not refused")
    worker.close()

"""
JOINED = 'ray.init(address="local", num_cpus=2, log_to_driver=False)'
SHUT = (
    SCRIPT.replace("{start}", JOINED)
    + """
ray.shutdown()
refused("was shut down")
optimizer.close()
assert not ray.is_initialized()
"""
)
FORKED = (
    SCRIPT.replace("{start}", JOINED)
    + """
if (child := os.fork()) == 0:
    signal.alarm(60)
    try:
        refused("was forked")
        build = DistNadam(backend="ray").build
        for call in (lambda: build(params), lambda: DistNadam.connect("x")):
            try:
                call()
            except LifecycleError as error:
                assert "was forked" in str(error), error
            else:
                raise AssertionError("not refused")
        optimizer.close()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
worker.pull()
assert worker.step(params) is not None
optimizer.close()
"""
)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(SHUT, id="after ray.shutdown()"),
        pytest.param(FORKED, id="in a fork", marks=pytest.mark.nightly),
    ],
)
def test_every_call_is_refused_at_once_and_starts_no_ray(tmp_path: Path, script: str) -> None:
    run(script, tmp_path)


def run(script: str, tmp_path: Path, **more: str) -> None:
    """Run a script that starts a Ray; its failure is the test's."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env=environment | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_a_ray_that_cannot_be_started_is_one_sentence(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    script = """
import numpy as np
from distnadam import DistNadam
from distnadam.errors import ClusterError
try:
    DistNadam(backend="ray").build({"w": np.ones(3, np.float32)})
except ClusterError as error:
    assert "Ray cannot be started here" in str(error) and "TMPDIR" in str(error), error
    assert "\\n" not in str(error)
else:
    raise AssertionError("it was started")
"""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"TMPDIR": str(long)}
    environment.pop("RAY_TMPDIR", None)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
