"""What a run exports, as it is seen by scraping the Prometheus endpoint of a real Ray; and where
Ray has none.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.errors import ClusterError
from distnadam.metrics.table import METRICS

HAS_METRICS = all(
    importlib.util.find_spec(name) is not None
    for name in ("aiohttp_cors", "opencensus", "prometheus_client")
)
RUN = """
import os, signal, sys
import numpy as np
import ray
from distnadam import DistNadam, Options
from distnadam.errors import CheckpointError

def tell(what):
    print(what, flush=True)
    input()

ray.init(
    address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20,
    log_to_driver=False,
)
gradients, options = {"w": np.ones(9000, np.float32)}, Options(metrics=True)

def build(name=None, *, options, **kwargs):
    return DistNadam(name=name, backend="ray", options=options, **kwargs).build(gradients)

with (
    build("seen", num_shards=2, replicas=1, options=options) as optimizer,
    build(num_shards=3, options=Options(transport="objects")) as other,
    build("silent", options=Options(metrics=False)) as silent,
    optimizer.worker(0) as worker,
    other.worker(0) as by_objects,
):
    silent.apply_gradients(gradients)
    worker.pull()
    for step in range(20):
        worker.step(gradients)
    for step in range(5):
        by_objects.step(gradients)
    optimizer.save(sys.argv[1])
    try:
        optimizer.save(sys.argv[1] + "/step_00000020/manifest.msgpack/no")
    except CheckpointError:
        pass
    tell(ray.nodes()[0]["MetricsExportPort"])
    victim = ray.get(optimizer.shards.backend.actors[1].about.remote())
    os.kill(int(victim["pid"]), signal.SIGKILL)
    for step in range(10):
        worker.step(gradients)
    tell("killed")
"""
LINE = re.compile(r"ray_(distnadam_\w+)\{(.*)\} (\S+)")


class Scraped:
    """What a Prometheus endpoint shows of distnadam."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = [LINE.match(line) for line in answer.read().decode().splitlines()]
        self.series = [
            (m[1], dict(re.findall(r'(\w+)="([^"]*)"', m[2])), float(m[3]))
            for m in lines
            if m is not None
        ]

    def __call__(self, name: str, optimizer: str = "seen", **tags: str) -> float:
        """The sum of the series of that name and tags, NaN where there is none."""
        tags |= {"optimizer": optimizer}
        found = [
            value
            for series, its, value in self.series
            if series == f"distnadam_{name}" and tags.items() <= its.items()
        ]
        return sum(found) if found else float("nan")

    @staticmethod
    def until(port: int, right: Callable[["Scraped"], bool]) -> "Scraped":
        """Scrape until it shows what is expected; the test's own time limit bounds it."""
        while not right(found := Scraped(port)):
            time.sleep(0.2)
        return found


@pytest.mark.slow
@pytest.mark.skipif(not HAS_METRICS, reason="Ray's Prometheus endpoint needs the extra metrics")
def test_a_prometheus_endpoint_shows_what_a_run_did(tmp_path: Path) -> None:
    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
    }  # which who scrapes does not need
    env, python = (
        os.environ | token | {"RAY_metrics_report_interval_ms": "2000"},
        [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path)],
    )
    with subprocess.Popen(
        python, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())
        found = Scraped.until(
            port,
            lambda s: (
                s("iterations") == s("step_seconds_count") == 20
                and s("apply_seconds_count") == 40
                and s("shard_bytes") == s("shard_bytes", "unnamed") == 16 * 9000
                and s("shard_imbalance") == pytest.approx(4904 / 4500)
                and s("queue_depth") == 0
                # each process exports in its own time
                and s("bytes_total", transport="lane", direction="pull") == 21 * 36000
                and s("bytes_total", "unnamed", transport="object", direction="pull") == 5 * 36000
                and s("save_seconds_count") == s("save_failures_total") == 1
            ),
        )
        for name, tags, _ in found.series:
            assert set(METRICS[re.sub("_(bucket|sum|count)$", "", name)].tag_keys) <= tags.keys()
        assert found("bytes_total", transport="lane", direction="push") == 20 * 36000
        assert found("bytes_total", transport="lane", direction="pull") == 21 * 36000
        assert found("bytes_total", "unnamed", transport="object", direction="push") == 5 * 36000
        assert found("bytes_total", "unnamed", transport="object", direction="pull") == 5 * 36000
        assert (
            found("push_seconds_count"),
            found("pull_seconds_count"),
            found("apply_seconds_count"),
        ) == (20, 1, 40)
        assert (found("save_seconds_count"), found("save_failures_total")) == (1, 1)
        assert not [tags for _, tags, _ in found.series if tags["optimizer"] == "silent"]
        print(file=process.stdin, flush=True)
        process.stdout.readline()
        found = Scraped.until(
            port,
            lambda seen: (
                seen("recoveries_total") == 1
                and seen("iterations") == 30
                and seen("replica_lag_rounds") == 0
            ),
        )
        assert {
            re.sub("_(bucket|sum|count)$", "", name) for name, _, _ in found.series
        } == METRICS.keys()
        print(file=process.stdin, flush=True)
    assert process.returncode == 0


@pytest.mark.skipif(HAS_METRICS, reason="the extra metrics is installed")
def test_where_ray_has_no_metrics_nothing_is_measured_and_insisting_is_refused(
    ray_cluster: None,
) -> None:
    with DistNadam(backend="ray").build({"w": np.ones(3, np.float32)}) as optimizer:
        assert optimizer.shards.backend.meter is None
    with pytest.raises(
        ClusterError,
        match=r"Ray's metrics are off on this process's node: pip install 'ray\[default\]",
    ):
        DistNadam(backend="ray", options=Options(metrics=True)).build({"w": np.ones(3, np.float32)})
