"""Hosts for the tests of this folder, which are skipped if none can be made."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import certificates
from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests on equal hosts one after the other, behind those of all other folders."""
    items.sort(key=_hosts_of)


def _hosts_of(item: pytest.Item) -> str:
    if item.path.parent != Path(__file__).parent:
        return ""
    certified = "hosts_with_certificates" in getattr(item, "fixturenames", ())
    return f"hosts {getattr(getattr(item, 'module', None), 'RESOURCES', '')} {certified}"


@pytest.fixture(scope="session")
def cluster_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """Returns a cluster for these arguments: the one that is up, or a new one in its place."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    up: dict[str, Cluster] = {}

    def close() -> None:
        while up:
            up.popitem()[1].close()

    def cluster(resources: list[dict[str, float]], *, certified: bool = False, **how: Any) -> Any:
        kind = repr((resources, certified, how))
        if kind not in up or not up[kind].is_whole():
            close()
            directory = tmp_path_factory.mktemp("hosts")
            env = certificates(directory) if certified else {}
            up[kind] = Cluster(directory, resources, env=env, **how)
        return up[kind]

    yield cluster
    close()


@pytest.fixture
def hosts(request: pytest.FixtureRequest, cluster_of: Callable[..., Cluster]) -> Cluster:
    """Whole hosts with the resources of a module's RESOURCES, shared by modules of equal ones."""
    return cluster_of(request.module.RESOURCES)


@pytest.fixture
def hosts_with_certificates(
    request: pytest.FixtureRequest, cluster_of: Callable[..., Cluster]
) -> Cluster:
    """The same with Ray's TLS."""
    return cluster_of(request.module.RESOURCES, certified=True)
