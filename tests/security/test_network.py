"""On one node nothing of ours listens on a network: what listens in a process of ours does in any
process of Ray. Between nodes, shards listen.
"""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import ray

from distnadam import DistNadam
from tests.backends.ray.test_backend import our_processes
from tests.test_architecture import MODULES, source_of

GRADIENTS = {"w": np.ones(5000, np.float32)}
LISTENING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}


def listeners(pid: int) -> set[tuple[str, str]]:
    """The protocols and local addresses at which a process takes what comes from a network."""
    sockets = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # closed meanwhile
    found = set()
    for protocol, state in LISTENING.items():
        for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in sockets:
                found.add((protocol, fields[1]))
    return found


class Bare:
    def pid(self) -> int:
        return os.getpid()


class Trainer:
    def __init__(self, optimizer: DistNadam) -> None:
        self.worker = optimizer.worker(0)
        self.worker.step(GRADIENTS)

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.slow
def test_our_processes_listen_where_any_actor_of_ray_does_and_nowhere_else(
    ray_cluster: None,
) -> None:
    older = our_processes()  # of a test before this one, about to end
    before = listeners(os.getpid())
    bare = ray.remote(num_cpus=0)(Bare).remote()
    usual = [protocol for protocol, _ in sorted(listeners(ray.get(bare.pid.remote())))]
    assert usual, "the look at a process sees what Ray listens on"
    with (
        DistNadam(num_shards=2, replicas=1, backend="ray").build(GRADIENTS) as optimizer,
        optimizer.worker(0) as worker,
    ):
        worker.step(GRADIENTS)
        trainer = ray.remote(num_cpus=0)(Trainer).remote(optimizer)
        theirs = ray.get(trainer.pid.remote())
        ours: dict[int, str] = {}
        while len(ours) < 5:  # until the standbys are there too; the test's time limit bounds it
            ours = {pid: title for pid, title in our_processes().items() if pid not in older}
        for pid, title in {**ours, theirs: "the trainer"}.items():
            found = sorted(listeners(pid))
            assert [protocol for protocol, _ in found] == usual, f"{title}: {found}"
        assert listeners(os.getpid()) == before
    ray.kill(trainer)
    ray.kill(bare)


def test_a_local_optimizer_listens_on_nothing() -> None:
    before = listeners(os.getpid())
    with (
        DistNadam(num_shards=2, backend="local").build(GRADIENTS) as optimizer,
        optimizer.worker(0) as worker,
    ):
        worker.step(GRADIENTS)
        assert listeners(os.getpid()) == before


def calls(source: str) -> list[str]:
    """What a source does with sockets: makes one, binds or connects one."""
    names = (
        "socket.socket",
        "create_server",
        "socket.create_connection",
        "HTTPServer",
        "start_server",
        "socketserver",
    )
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(node) for node in found if any(name in ast.unparse(node.func) for name in names)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_only_these_modules_open_a_socket_that_leaves_this_machine(module: str) -> None:
    made = [
        call
        for call in calls(source_of(module))
        if not call.startswith("socket.socket(socket.AF_UNIX")
    ]
    allowed = {
        "backends/ray/session": "socket.create_connection(",  # to Ray's head
        "backends/ray/joined": "socket.create_connection(",
        "planning/measuring": "socket.create_",  # both ends on the loopback
        "transport/tcp_dial": "socket.create_connection(",  # to a process of another host
        "transport/tcp_listener": "socket.create_server(",
    }
    assert made == [] or all(call.startswith(allowed.get(module, "none")) for call in made)
