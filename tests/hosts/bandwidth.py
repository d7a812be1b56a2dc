"""Steps over a link of known bandwidth: the bytes moved, and the time beside bytes / bandwidth."""

import json
from dataclasses import dataclass

from tests.hosts.cluster import Cluster
from tests.hosts.network import BURST_BYTES

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The bytes that a step moved over the shards' link, in and out, and its duration.

    Gradients go in before parameters come out, so the times of both directions add up.
    """

    parameter_bytes: int
    bytes_in: float
    bytes_out: float
    seconds: float
    bits_per_s: float | None

    @property
    def explained_s(self) -> float:
        """The seconds that the bytes need at the link's bandwidth."""
        return (
            8 * (self.bytes_in + self.bytes_out) / self.bits_per_s
            if self.bits_per_s is not None
            else 0.0
        )

    @property
    def least_s(self) -> float:
        """The least seconds of a step: each gradient and parameter passes, less the bursts."""
        return (
            8 * 2 * (self.parameter_bytes - BURST_BYTES) / self.bits_per_s
            if self.bits_per_s is not None
            else 0.0
        )

    def __str__(self) -> str:
        sizes = (
            f"{self.parameter_bytes / 1e6:.0f} MB of parameters: {self.bytes_in / 1e6:.1f} "
            f"MB in, {self.bytes_out / 1e6:.1f} MB out"
        )
        if self.bits_per_s is None:
            return f"{sizes}, {1e3 * self.seconds:.0f} ms a step over an unlimited link"
        speed = (
            f"{self.bits_per_s / 1e9:g} Gbit/s explain {1e3 * self.explained_s:.0f} ms, a "
            f"step takes {1e3 * self.seconds:.0f} ms"
        )
        return f"{sizes}; {speed}: {self.seconds / self.explained_s:.2f} times that"


def measure(cluster: Cluster, size: int, steps: int, bits_per_s: float | None) -> Measurement:
    """Step with a worker on the head and a shard on the second host."""
    shards = cluster.hosts[1]
    program = cluster.python(
        cluster.hosts[0],
        "-m",
        "tests.hosts.stepping",
        json.dumps({"size": size, "num_shards": 1, "steps": steps}),
    )
    program.first("warm")
    if bits_per_s is not None:
        shards.shape(bits_per_s)
    before = shards.traffic()
    program.tell("go on")
    seconds = program.first("median_s")["median_s"]
    after = shards.traffic()
    shards.unshape()
    program.tell("end")
    program.finish()
    received, sent = (now - then for now, then in zip(after, before, strict=True))
    return Measurement(
        parameter_bytes=FLOAT32_BYTES * size,
        bytes_in=received / steps,
        bytes_out=sent / steps,
        seconds=seconds,
        bits_per_s=bits_per_s,
    )
