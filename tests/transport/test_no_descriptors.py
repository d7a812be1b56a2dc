"""Where no more descriptors can be had, lanes and memory are refused by our own errors."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distnadam.errors import ArenaError, LaneError
from distnadam.transport.shared_memory import Arena
from distnadam.transport.unix_connection import Address, ConnectionServer, connect


@pytest.fixture
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("no_descriptors")
def test_lanes_and_memory_without_descriptors_are_our_errors() -> None:
    with pytest.raises(LaneError, match="Too many open files"):
        connect(Address("nobody", "token"), {}, [])
    with pytest.raises(LaneError, match="Too many open files"):
        ConnectionServer(lambda *_: ({}, []), lambda *_: None, lambda _: None)
    with pytest.raises(ArenaError, match="Too many open files"):
        Arena.create({"float32": 1})


@pytest.mark.parametrize("spare", range(6))
def test_a_local_optimizer_lives_or_refuses_with_few_descriptors(
    tmp_path: Path, spare: int
) -> None:
    script = f"""
import resource
import numpy as np
from distnadam import DistNadam
from distnadam.errors import DistNadamError
resource.setrlimit(resource.RLIMIT_NOFILE, (3 + {spare}, resource.getrlimit(7)[1]))
params = {{"w": np.ones(300_000, np.float32)}}
try:
    with DistNadam(backend="local", num_shards=2).build(params) as optimizer:
        for wait in (True, False):
            optimizer.apply_gradients(params)
            try:
                saved = optimizer.save("saved", wait=wait)
                if not wait:
                    saved.result()
            except DistNadamError as error:
                assert "Too many open files" in str(error), error
        assert optimizer.iterations == 2
except DistNadamError as error:
    assert "Too many open files" in str(error), error
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=tmp_path)
