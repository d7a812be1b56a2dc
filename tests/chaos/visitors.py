"""Other processes that act on the optimizer as a whole, so as to be killed meanwhile."""

import os
import signal

import ray

from distnadam import DistNadam
from distnadam.backends.ray.processes import process_start_time
from tests.chaos.scene import Scene
from tests.chaos.trainers import Process, despite_rewinds


class Visitor:
    """Another process that reads, saves, or holds all shards at a boundary."""

    def __init__(self, optimizer: DistNadam, directory: str) -> None:
        self._optimizer, self._directory = optimizer, directory

    def about(self) -> tuple[int, str]:
        return os.getpid(), process_start_time(os.getpid())

    def read(self) -> None:
        while True:
            despite_rewinds(self._optimizer.get_weights)

    def save(self) -> None:
        while True:
            despite_rewinds(lambda: self._optimizer.save(self._directory))

    def hold(self) -> None:
        shards = self._optimizer.shards

        def die() -> None:
            with shards.boundary():
                os.kill(os.getpid(), signal.SIGKILL)

        despite_rewinds(lambda: shards.recovering(die))


_visitor = ray.remote(Visitor).options(num_cpus=0, max_concurrency=2, max_restarts=0)


def visit(scene: Scene, what: str) -> tuple[Process, object]:
    actor = _visitor.remote(scene.optimizer, str(scene.directory / "checkpoints"))
    victim = Process(*ray.get(actor.about.remote()))
    return victim, getattr(actor, what).remote()
