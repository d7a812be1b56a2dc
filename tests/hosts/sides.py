"""`python -m tests.hosts.sides JSON`: an optimizer whose only shard and worker share a host.

It prints where they and the supervisor are. At "take over" on standard input, a worker on its own
host, the head, takes the rank over.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distnadam import DistNadam, Options
from distnadam.errors import DistNadamError, Rewound, StaleEpoch, StepTimeout
from distnadam.protocol.messages import Describe
from tests.hosts.program import say
from tests.hosts.tasks import digest_of

SIZE = 5000
_PAUSE_S = 0.02


def params() -> Any:
    return {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}


def gradients(tree: Any, step: int) -> Any:
    """Return the gradients at these parameters and this step."""
    return {"w": tree["w"] - np.float32(3) + np.float32(step % 7)}


class Trainer:
    """The only rank, which records when each round was decided, and how it ended."""

    def __init__(self, optimizer: DistNadam, diary: str, rounds: int) -> None:
        self._worker = optimizer.worker(0)
        self._diary = Path(diary)
        self._rounds = rounds

    def run(self) -> None:
        """Train until `rounds` rounds are decided, or another worker has taken the rank over."""
        while True:
            try:
                tree = self._worker.pull()
                while self._worker.round < self._rounds:
                    tree = self._worker.step(gradients(tree, self._worker.round))
                    self._note(str(self._worker.round))
                    time.sleep(_PAUSE_S)
                self._note("done")
                return
            except (StaleEpoch, StepTimeout) as error:
                self._note(f"met {type(error).__name__}")
            except DistNadamError as error:
                self._note(f"ended by {type(error).__name__}")
                raise

    def _note(self, what: str) -> None:
        with self._diary.open("a") as file:
            file.write(f"{time.time():.4f} {what}\n")


def nothing() -> None:
    """Take a turn on a host."""


def build(about: dict[str, Any]) -> tuple[DistNadam, str, str]:
    """Build optimizers until the supervisor is with the shard, or apart, as asked.

    Ray does not let one choose.
    """
    options = Options(
        shard_resources={"shard": 1},
        shard_timeout_s=8.0,
        step_timeout_s=60.0,
        rejoin_timeout_s=60.0,
        checkpoint_dir=about["directory"],
    )
    in_turn = ray.remote(num_cpus=0, resources={"shard": 1}, scheduling_strategy="SPREAD")(nothing)
    seen = []
    for _ in range(30):
        how = {"replicas": about["replicas"], "name": f"sides-{time.time_ns()}", "options": options}
        optimizer = DistNadam(backend="ray", **how).build(params())
        backend: Any = optimizer.shards.backend
        nodes = [
            ray.get(actor.about.remote())["node"].split()[0]
            for actor in (backend.actors[0], backend.supervisor.actor)
        ]
        if (nodes[0] == nodes[1]) == about["together"]:
            return optimizer, nodes[0], nodes[1]
        seen.append(nodes)
        optimizer.close()
        # Ray takes the two hosts in turn, for a shard and its standby: one more, and the next shard
        # goes to the other host
        ray.get(in_turn.remote())
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    raise AssertionError(f"of nodes {alive}, Ray took (shard, supervisor) in turn: {seen}")


def main(about: dict[str, Any]) -> None:
    """Run the command."""
    ray.init(log_to_driver=False)
    optimizer, shard, supervisor = build(about)
    shards = optimizer.shards
    while about["replicas"] and shards.ask({0: Describe()})[0].replicated is None:
        time.sleep(0.05)
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    trainer = ray.remote(num_cpus=0)(Trainer)

    def train(host: str, diary: str) -> Any:
        there = NodeAffinitySchedulingStrategy(nodes[host], soft=False)
        return trainer.options(scheduling_strategy=there).remote(optimizer, diary, about["rounds"])

    first = train(shard, about["diaries"][0])
    first.run.remote()
    say(shard=shard, supervisor=supervisor)
    assert sys.stdin.readline().strip() == "take over"
    second = train(ray.util.get_node_ip_address(), about["diaries"][1])
    ray.get(second.run.remote())
    while True:
        try:
            say(digest=digest_of(optimizer))
            break
        except Rewound:
            continue
    optimizer.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
