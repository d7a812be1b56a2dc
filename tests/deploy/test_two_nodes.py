"""Two real Ray nodes, started as deploy/README.md says, behind a token.

The driver knows only the address.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RAY = str(Path(sys.executable).parent / "ray")
SPREAD = """
import json
from collections import Counter
import numpy as np
import ray
from distnadam import DistNadam

start = {"w": np.ones(9000, np.float32)}
with DistNadam(num_shards=4, num_workers=2, backend="auto").build(start) as optimizer:
    facts = ray.get([actor.about.remote() for actor in optimizer.shards.backend.actors])

    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def train(optimizer, rank):
        with optimizer.worker(rank) as worker:
            for step in range(5):
                params = worker.step({"w": np.full(9000, rank + 1, np.float32)})
            return float(params["w"].sum())

    ends = ray.get([train.remote(optimizer, rank) for rank in range(2)])
    nodes = Counter(f["node"] for f in facts)
    print(json.dumps({"nodes": nodes, "ends": ends, "iterations": optimizer.iterations}))
"""
REFUSED = """
import numpy as np
from distnadam import DistNadam
from distnadam.errors import VersionMismatch
try:
    DistNadam(num_shards=4, backend="ray").build({"w": np.ones(9000, np.float32)})
except VersionMismatch as error:
    print(error)
"""
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "distnadam":
            raise ModuleNotFoundError("No module named 'distnadam'")
sys.meta_path.insert(0, Hide())
"""
OTHER_VERSION = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda package: "1.2.3" if package == "numpy" else real(package)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def node(env: dict[str, str], *args: str) -> Iterator[None]:
    """Run one Ray node until the body ends."""
    common = [
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
        "--block",
    ]
    process = subprocess.Popen(
        [RAY, "start", *args, *common],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "--block" in line:  # the last line before it waits
                break
        assert process.poll() is None
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def environment(directory: Path) -> dict[str, str]:
    """Return an environment whose only Ray settings are those of a new token in the directory."""
    token = directory / "token"
    token.write_text(secrets.token_hex(32))
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@contextmanager
def two_nodes(directory: Path, second_starts_with: str | None = None) -> Iterator[dict[str, str]]:
    """A head and a second node with a token; yields the environment of a driver."""
    base = environment(directory)
    port, second = free_port(), dict(base)
    if second_starts_with is not None:
        (directory / "sitecustomize.py").write_text(second_starts_with)
        second["PYTHONPATH"] = str(directory)
    with (
        node(base, "--head", f"--port={port}", "--include-dashboard=false"),
        node(second, f"--address=127.0.0.1:{port}"),
    ):
        yield base | {"RAY_ADDRESS": f"127.0.0.1:{port}"}


def drive(code: str, env: dict[str, str], cwd: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.nightly  # tests/hosts spread them too
def test_shards_and_workers_spread_over_both_nodes_and_a_wrong_token_is_one_sentence(
    tmp_path: Path,
) -> None:
    with two_nodes(tmp_path) as env:
        result = json.loads(drive(SPREAD, env, tmp_path))
        assert sorted(result["nodes"].values()) == [2, 2]
        assert result["ends"][0] == result["ends"][1]
        assert result["iterations"] == 5
        train = [
            sys.executable,
            "-m",
            "distnadam",
            "train",
            "digits",
            "--steps",
            "20",
            "--json",
            "--quiet",
        ]
        done = subprocess.run(
            train, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert "accuracy" in json.loads(done.stdout)
        wrong = {k: v for k, v in env.items() if k != "RAY_AUTH_TOKEN_PATH"} | {
            "RAY_AUTH_TOKEN": "0" * 64
        }
        done = subprocess.run(
            train, env=wrong, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 1
        assert "cannot join the Ray at RAY_ADDRESS" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("sitecustomize", "message"),
    [
        (HIDE, "lacks the package 'distnadam'"),
        pytest.param(OTHER_VERSION, "numpy 1.2.3", marks=pytest.mark.nightly),
    ],
)
def test_a_node_that_lacks_a_package_or_its_version_is_refused_before_training(
    sitecustomize: str, message: str, tmp_path: Path
) -> None:
    with two_nodes(tmp_path, sitecustomize) as env:
        refusal = drive(REFUSED, env, tmp_path)
        assert message in refusal
        assert re.match(r"node \d+\.\d+\.\d+\.\d+", refusal)
