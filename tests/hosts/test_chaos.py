"""Random faults of every kind on training hosts change no bit, and every push counts once."""

from pathlib import Path

import pytest

from tests.hosts import chaos
from tests.hosts.cluster import ALL_ON_ANY, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RESOURCES = ALL_ON_ANY
SEED = 6


def test_a_handful_of_faults_of_the_network_change_no_bit(
    hosts: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = chaos.play(6, SEED, hosts, tmp_path)
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.differences, str(report)
    assert sum(map(len, report.seconds.values())) == 6
