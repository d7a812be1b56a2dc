"""The meter: durations by bucket, samples with exact proportions, bytes by how they move."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import DistNadam, Options
from distnadam.hyperparameters import NadamConfig
from distnadam.metrics.meter import BOUNDS_S, Meter, Seconds, Traffic, shard_bytes, shard_samples
from distnadam.metrics.table import METRICS
from distnadam.protocol.messages import Describe, ShardSpec
from distnadam.tensors.arrays import dtypes_of
from distnadam.tensors.layout import Layout


def test_a_duration_counts_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    seconds = Seconds()
    for bound in BOUNDS_S:
        seconds.add(bound)
    seconds.add(1e9)
    assert seconds.take(1000) == [1] * (len(BOUNDS_S) + 1)
    assert not any(seconds.take(1000)), "what was taken is not counted again"


@given(st.lists(st.lists(st.integers(0, 5000), min_size=3, max_size=3), min_size=1, max_size=30))
def test_a_sample_of_too_many_durations_has_exact_proportions_in_the_long_run(
    flushes: list[list[int]],
) -> None:
    seconds, sampled, wanted = Seconds(), np.zeros(3), np.zeros(3)
    for counts in flushes:
        for bucket, count in enumerate(counts):
            seconds.add(BOUNDS_S[bucket], count)
        taken = seconds.take(100)
        assert sum(taken) <= max(100, 100 + 3)
        sampled += taken[:3]
        wanted += np.array(counts) * min(1, 100 / max(1, sum(counts)))
    assert np.abs(sampled - wanted).max() < 1.001


def test_traffic_depends_on_how_each_shard_is_reached_and_on_the_dtypes_of_both_ways() -> None:
    meter = Meter(None)
    ranges = [
        {"float32": (0, 1000), "float64": (0, 0)},
        {"float32": (1000, 1500), "float64": (0, 10)},
    ]
    gradients = {"float32": np.empty(1500, np.float16), "float64": np.empty(10)}
    own, rounded = dtypes_of(gradients), dtypes_of(gradients, float32="bfloat16")
    traffic = Traffic.of(ranges, frozenset({0}), frozenset({1}), gradients, own)
    traffic.pushed, traffic.pulled = 3, 2
    meter.traffic.append(traffic)
    meter.traffic.append(Traffic.of(ranges, frozenset({0, 1}), frozenset(), gradients, own))
    moved = {
        tuple(tags.values()): value
        for name, tags, value in meter.samples()
        if name == "distnadam_bytes_total"
    }
    assert moved == {
        ("lane", "push"): 3 * 2000,
        ("object", "push"): 3 * (1000 + 80),
        ("lane", "pull"): 2 * 4000,
        ("object", "pull"): 2 * (2000 + 80),
    }
    half = Traffic.of(ranges, frozenset({0}), frozenset({1}), gradients, rounded)
    assert half.pull_bytes == {"lane": 2000, "object": 1000 + 80}


def test_what_goes_by_tcp_is_counted_by_the_shard_and_not_by_the_worker() -> None:
    ranges = [{"float32": (0, 1000)}, {"float32": (1000, 1500)}]
    gradients = {"float32": np.ones(1500, np.float32)}
    dtypes = dtypes_of(gradients)
    traffic = Traffic.of(ranges, frozenset({0}), frozenset(), gradients, dtypes)
    assert traffic.push_bytes == traffic.pull_bytes == {"lane": 4000, "object": 0}
    with DistNadam(backend="local").build({"w": gradients["float32"]}) as optimizer:
        backend: Any = optimizer.shards.backend
        host = backend.transport.hosts[0]
        host.traffic_of = lambda: {"10.0.0.2": (300, 5), "10.0.0.3": (20, 1)}
        now = host.send(Describe()).result()
        moved = {
            tuple(tags.values()): value
            for name, tags, value in shard_samples(host.shard.spec, now)
            if name == "distnadam_bytes_total"
        }
    assert moved == {("tcp", "pull"): 320, ("tcp", "push"): 6}


def test_every_sample_is_in_the_table_with_its_tags() -> None:
    meter = Meter("mine")
    meter.traffic.append(Traffic({"lane": 1, "object": 1}, {"lane": 1, "object": 1}))
    for name, tags, _ in meter.samples():
        assert METRICS[name].tag_keys == ("optimizer", *tags)
        assert METRICS[name].kind != "histogram"


@pytest.mark.parametrize(("use_ema", "arrays"), [(False, 4), (True, 5)])
@pytest.mark.parametrize(
    ("ranges", "size"), [({"float32": (5, 10), "float64": (0, 2)}, 5 * 4 + 2 * 8), ({}, 0)]
)
def test_a_shards_state_is_two_buffers_of_parameters_both_moments_and_the_average(
    ranges: dict[str, tuple[int, int]], size: int, use_ema: bool, arrays: int
) -> None:
    spec = ShardSpec(
        index=0,
        num_shards=1,
        num_workers=1,
        replicas=0,
        name=None,
        config=NadamConfig(use_ema=use_ema),
        options=Options(),
        layout=Layout.of({"w": np.ones(9, np.float32)}),
        ranges=ranges,
    )
    assert shard_bytes(spec) == arrays * size
