"""The examples of deploy/, run as their first lines say, with workers on three hosts."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.cluster import RAY, ROOT, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

EXAMPLES = ROOT / "deploy" / "examples"
TAKES_JOBS = importlib.util.find_spec("aiohttp_cors") is not None
TRAINS = importlib.util.find_spec("pyarrow") is not None
RESOURCES = [{"CPU": 2}] * 3


@pytest.fixture
def cluster(cluster_of: Callable[..., Cluster]) -> Cluster:
    return cluster_of(RESOURCES, dashboard=TAKES_JOBS)


def ends(said: str, before: str) -> list[str]:
    """Return the distinct values in the list that follows some words in the output."""
    return [
        value for value in said.partition(f"{before}[")[2].partition("]")[0].split(",") if value
    ]


@pytest.mark.nightly
def test_from_ray_tasks(cluster: Cluster) -> None:
    said = cluster.python(cluster.hosts[1], EXAMPLES / "tasks.py").finish()
    assert len(ends(said, "50 steps, every rank ends with ")) == 1


def test_from_ray_actors(cluster: Cluster) -> None:
    said = cluster.python(cluster.hosts[1], EXAMPLES / "actors.py").finish()
    assert len(ends(said, "60 steps, every rank is at ")) == 1


def test_from_plain_processes_that_know_an_address_and_a_name(cluster: Cluster) -> None:
    assert (
        "shared is running"
        in cluster.python(cluster.hosts[0], EXAMPLES / "plain.py", "build", "shared").finish()
    )
    programs = [
        cluster.python(host, EXAMPLES / "plain.py", "train", "shared", rank)
        for rank, host in enumerate(cluster.hosts[1:])
    ]
    ends = [program.finish().splitlines()[-1] for program in programs]
    assert [end.split(" ends with ")[0] for end in ends] == ["rank 0", "rank 1"]
    assert ends[0].split(" ends with ")[1] == ends[1].split(" ends with ")[1]
    assert ends[0].endswith("after 50 rounds")


@pytest.mark.nightly
@pytest.mark.skipif(
    not TAKES_JOBS, reason="ray job submit needs ray[default], of the extra interop"
)
def test_from_a_job(cluster: Cluster, tmp_path: Path) -> None:
    submit = [
        RAY,
        "job",
        "submit",
        "--address",
        "http://127.0.0.1:8265",
        "--working-dir",
        str(EXAMPLES),
    ]
    said = cluster.run(
        cluster.hosts[0], *submit, "--", "python", "job.py", str(tmp_path / "run")
    ).finish()
    assert "y = 3.00 x + 1.00" in said
    assert "succeeded" in said
    again = cluster.run(
        cluster.hosts[0], *submit, "--", "python", "job.py", str(tmp_path / "run")
    ).finish()
    assert "resuming from" in again


@pytest.mark.nightly
@pytest.mark.skipif(not TRAINS, reason="Ray Train needs ray[train], of the extra interop")
def test_from_a_function_of_ray_train(cluster: Cluster, tmp_path: Path) -> None:
    said = cluster.python(cluster.hosts[0], EXAMPLES / "train_function.py", tmp_path).finish()
    assert "50 steps, a parameter is " in said
