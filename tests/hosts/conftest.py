"""Hosts for the tests of this folder, which are skipped if none can be made."""

from collections.abc import Iterator

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """Hosts with the resources of a module's RESOURCES, for one test."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("hosts"), request.module.RESOURCES) as cluster:
        yield cluster


@pytest.fixture
def whole_hosts(hosts: Cluster) -> Iterator[Cluster]:
    """Hosts for all tests of a module; those that a test damages are started again after it."""
    yield hosts
    for host in sorted(hosts.struck, key=lambda host: host.number):
        hosts.restart(host)
