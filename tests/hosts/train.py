"""`python -m tests.hosts.train JSON` calls `fit` over the hosts and prints its events.

With "backend": "local" it runs in its own process.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distnadam import DistNadam, Options, fit
from distnadam.backends.ray.backend import RayBackend
from distnadam.client.shard_group import ShardGroup
from distnadam.training.callbacks import Callback
from distnadam.training.tasks.digits import Digits
from tests.hosts.program import say
from tests.hosts.tasks import Synthetic, digest

_ROOT = Path(__file__).parent.parent.parent
_LOOK_EVERY_S = 0.1


class Say(Callback):
    """Prints the events of `fit`, the shards' hosts, and the number of standbys."""

    def __init__(self) -> None:
        self._looked_at = 0.0
        self._standbys = 0

    def on_begin(self, step: int, steps: int) -> None:
        say(begin=step, shards=hosts_of(_running().backend))

    def on_step(self, step: int, loss: float) -> None:
        say(step=step)
        if time.monotonic() < self._looked_at + _LOOK_EVERY_S:
            return
        standbys = sum(each.replicated is not None for each in _running().describe_all())
        if standbys != self._standbys:
            say(standbys=standbys)
        self._looked_at = time.monotonic()
        self._standbys = standbys

    def on_message(self, text: str) -> None:
        say(message=text)


class Retune(Callback):
    """Changes rates at every evaluation, as the number of steps says.

    Args:
        every: steps between evaluations; one at the end of a run changes nothing.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        turn = step // self._every
        if step == turn * self._every:
            self.run.optimizer.set_config(lr=0.002 / (1 + turn % 5), beta_1=0.9 - 0.05 * (turn % 3))


class StopAt(Callback):
    """Ends the run once a file exists."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_step(self, step: int, loss: float) -> None:
        if self._path.exists():
            self.run.stop("its time is over")


def _running() -> ShardGroup:
    """Return the shards of the optimizer that `fit` trains now."""
    found = [each for each in gc.get_objects() if isinstance(each, ShardGroup)]
    return next(
        each
        for each in found
        if not (isinstance(each.backend, RayBackend) and each.backend.supervisor.closed)
    )


def hosts_of(backend: Any) -> list[str]:
    """Return the address of each shard's host."""
    if not isinstance(backend, RayBackend):
        return []
    import ray

    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [hosts[address.node] for address in backend.addresses]


def train_in_one_process(directory: Path, about: dict[str, Any]) -> dict[str, str]:
    """Train with the local backend and one shard in another process; return the bits at the end."""
    alone = {
        **about,
        "directory": str(directory),
        "num_shards": 1,
        "options": {},
        "backend": "local",
    }
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.hosts.train", json.dumps(alone)],
        cwd=_ROOT,
        env=env,
        check=True,
        capture_output=True,
    )
    return digest(directory)


def main(about: dict[str, Any]) -> None:
    """Train as the JSON says."""
    task = (
        Synthetic(about["size"], about.get("pause_s", 0.0), about.get("awaits"))
        if "size" in about
        else Digits()
    )
    optimizer = DistNadam(
        name=about.get("name"),
        clipnorm=about.get("clipnorm"),
        options=Options(**about.get("options", {})),
    )
    how = {
        key: about[key]
        for key in (
            *("num_workers", "num_shards", "replicas", "save_every", "keep", "evaluate_every"),
            "backend",
        )
        if key in about
    }
    callbacks: list[Callback] = [Say()]
    if "evaluate_every" in about:
        callbacks.append(Retune(about["evaluate_every"]))
    if "ends" in about:
        callbacks.append(StopAt(about["ends"]))
    fit(
        task,
        steps=about["steps"],
        checkpoint_dir=about["directory"],
        optimizer=optimizer,
        verbose=False,
        callbacks=callbacks,
        **how,
    )
    say(done=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
