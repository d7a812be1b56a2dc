"""Hosts for the tests of this folder, which are skipped where none can be made."""

from collections.abc import Iterator

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """Hosts with the resources that a module's RESOURCES gives them; each test may do to them what
    it likes.
    """
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("hosts"), request.module.RESOURCES) as cluster:
        yield cluster


@pytest.fixture
def whole_hosts(hosts: Cluster) -> Iterator[Cluster]:
    """The same hosts; those that the test struck at are started anew after it."""
    yield hosts
    for host in sorted(hosts.struck, key=lambda host: host.number):
        hosts.restart(host)
