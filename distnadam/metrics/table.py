"""The table of exported metrics: names, kinds, descriptions and tags.

Ray's exporter prefixes a name with `ray_`, and appends `_bucket`, `_sum` or `_count` to a
histogram's. The files in deploy/ are checked against this table. Histograms of frequent events are
samples: their proportions are exact, their counts are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric: its kind, its description, and its tag keys.

    >>> METRICS["distnadam_step_seconds"].kind
    'histogram'
    """

    kind: Literal["histogram", "counter", "gauge"]
    description: str
    tag_keys: tuple[str, ...] = ("optimizer",)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "distnadam_push_seconds": Metric(
            "histogram", "Seconds in which a worker hands over one gradient."
        ),
        "distnadam_apply_seconds": Metric(
            "histogram", "Seconds in which a shard applies one round."
        ),
        "distnadam_pull_seconds": Metric(
            "histogram", "Seconds in which a worker gets the parameters."
        ),
        "distnadam_step_seconds": Metric(
            "histogram", "Seconds of a worker's step: push, wait for every rank, pull."
        ),
        "distnadam_save_seconds": Metric("histogram", "Seconds in which a checkpoint is written."),
        "distnadam_bytes_total": Metric(
            "counter",
            "Bytes of gradients and parameters that moved, by shared memory (lane), between hosts "
            "by TCP (tcp, as the shards count it), or by Ray objects (object).",
            ("optimizer", "transport", "direction"),
        ),
        "distnadam_recoveries_total": Metric(
            "counter",
            "Deaths of shards and workers that were recovered from; all shards going back counts "
            "once.",
        ),
        "distnadam_save_failures_total": Metric(
            "counter", "Checkpoints that could not be written."
        ),
        "distnadam_queue_depth": Metric(
            "gauge", "Pushes that a shard holds for a round not yet applied."
        ),
        "distnadam_shard_bytes": Metric(
            "gauge", "Bytes of state that a shard holds.", ("optimizer", "shard")
        ),
        "distnadam_shard_imbalance": Metric(
            "gauge", "The largest shard's bytes over the mean of all."
        ),
        "distnadam_iterations": Metric("gauge", "Steps applied so far."),
        "distnadam_replica_lag_rounds": Metric(
            "gauge",
            "Rounds by which a shard's standby is behind it; all of them where it has none yet.",
        ),
    }
)
