"""A host with a shard and all its workers is cut off and comes back: both sides never go on.

The side that is cut off has all that training needs, in one variant the supervisor too; the other
side has Ray's head.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distnadam import DistNadam
from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.sides import gradients, params
from tests.hosts.tasks import digest_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ALL_ON_ANY
ROUNDS = 200


def rounds(diary: Path) -> list[tuple[float, int]]:
    """Return when a trainer learned of each round."""
    return [(float(moment), int(what)) for moment, what in entries(diary) if what.isdigit()]


def entries(diary: Path) -> list[tuple[str, str]]:
    lines = diary.read_text().splitlines() if diary.exists() else []
    return [(moment, what) for moment, _, what in (line.partition(" ") for line in lines)]


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until a condition holds; the test's own timeout bounds it."""
    while not what():
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("how", "replicas", "together"),
    [
        pytest.param("cut", 0, False, id="cut off", marks=pytest.mark.nightly),
        pytest.param("cut", 1, True, id="cut off with its supervisor"),
        pytest.param("silence", 1, False, id="not heard", marks=pytest.mark.nightly),
        pytest.param(
            "deafen", 0, True, id="not hearing, with its supervisor", marks=pytest.mark.nightly
        ),
    ],
)
def test_a_side_that_is_cut_off_stops_before_the_other_continues_and_is_then_refused(
    how: str, replicas: int, together: bool, hosts: Cluster, tmp_path: Path
) -> None:
    diaries = [tmp_path / "first", tmp_path / "second"]
    about = {
        "replicas": replicas,
        "together": together,
        "directory": str(tmp_path / "checkpoints"),
        "rounds": ROUNDS,
    }
    program = hosts.python(
        hosts.hosts[0],
        "-m",
        "tests.hosts.sides",
        json.dumps(about | {"diaries": [str(diary) for diary in diaries]}),
    )
    victim = hosts.host_at(program.first("shard")["shard"])
    wait_for(lambda: len(rounds(diaries[0])) >= 20)
    hosts.kill(victim, how)
    program.tell("take over")
    wait_for(lambda: len(rounds(diaries[1])) >= 20)
    victim.unshape()
    victim.mend()
    wait_for(lambda: hosts.ended(victim) or entries(diaries[0])[-1][1].startswith("ended"))
    digest = program.first("digest")["digest"]
    program.finish()
    assert rounds(diaries[0])[-1][0] < rounds(diaries[1])[0][0], "both sides went on"
    ended = [what for _, what in entries(diaries[0]) if what.startswith("ended")]
    # the latter if the run ends before it asks
    refused = (["ended by SupersededWorker"], ["ended by LifecycleError"])
    assert ended in ([], *refused), "it ends with its host's Ray, or is refused by name"
    if replicas:
        last, resumed = rounds(diaries[0])[-1][1], rounds(diaries[1])[0][1]
        assert resumed in (last + 1, last + 2), (
            "every round that was reported counts; one that only the standby has may"
        )
    with DistNadam(backend="local").build(params()) as alone, alone.worker(0) as worker:
        tree = worker.pull()
        for step in range(ROUNDS):
            tree = worker.step(gradients(tree, step))
        assert digest == digest_of(alone)
