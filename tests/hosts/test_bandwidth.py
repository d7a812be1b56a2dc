"""Over a link of 1 Gbit/s, a step moves each gradient and parameter once, and little else."""

import pytest

from tests.hosts.bandwidth import measure
from tests.hosts.cluster import ONE_EACH, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ONE_EACH


def test_a_step_between_hosts_moves_every_gradient_and_every_parameter_once(
    hosts: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measure(hosts, size=4 * 10**6, steps=10, bits_per_s=1e9)
    with capsys.disabled():
        print(f"\n{measured}")
    for moved in (measured.bytes_in, measured.bytes_out):
        assert measured.parameter_bytes <= moved <= 1.15 * measured.parameter_bytes
    assert measured.least_s <= measured.seconds, (
        "the cable was not of that speed, or not all passed in the step"
    )
