"""A step between two hosts over links of several bandwidths, beside bytes over bandwidth.

The hosts are network namespaces of this machine, a worker on one and a shard on the other. It needs
root and iproute2.
"""

import tempfile
from pathlib import Path

from tests.hosts.bandwidth import measure
from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not

SIZES = (10**6, 10**7)
SPEEDS = (None, 1e10, 1e9)
STEPS = 10


def main() -> None:
    """Print one line per size and bandwidth."""
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(Path(directory), [{"CPU": 1}, {"CPU": 1, "shard": 1}]) as cluster,
    ):
        for size in SIZES:
            for speed in SPEEDS:
                print(measure(cluster, size, STEPS, speed), flush=True)


if __name__ == "__main__":
    main()
