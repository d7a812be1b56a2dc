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


MAKES_SOCKETS = (
    "socket.socket",
    "create_server",
    "create_connection",
    "open_connection",
    "start_server",
    "socketserver",
    "HTTPServer",
    "HTTPConnection",
    "HTTPSConnection",
    "urlopen",
    "build_opener",
)


def uses(source: str) -> list[str]:
    """What a source does with sockets: makes, binds or connects one, or is a class that does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        made = [node.func] if isinstance(node, ast.Call) else getattr(node, "bases", [])
        if any(name in ast.unparse(each) for each in made for name in MAKES_SOCKETS):
            found.append(ast.unparse(node).splitlines()[0])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_only_these_modules_open_a_socket_that_leaves_this_machine(module: str) -> None:
    made = [
        use for use in uses(source_of(module)) if not use.startswith("socket.socket(socket.AF_UNIX")
    ]
    allowed = {
        "backends/notices": "urllib.request.build_opener(",  # to a cloud's metadata service
        "backends/ray/session": "socket.create_connection(",  # to Ray's head
        "backends/ray/joined": "socket.create_connection(",
        "planning/measuring": "socket.create_",  # both ends on the loopback
        "report/dashboard": "class _Server(ThreadingHTTPServer):",  # a page, if asked for
        # to a process of another host, by a socket that a loop then takes
        "transport/tcp_dial": ("socket.create_connection(", "asyncio.get_running_loop().create_"),
        "transport/tcp_listener": "socket.create_server(",
    }
    assert all(use.startswith(allowed.get(module, "none")) for use in made)
    assert made or module not in allowed


@pytest.mark.parametrize(
    "source",
    [
        "socket.create_connection(('host', 1))",
        "async def f():\n    await loop.create_server(factory, 'host', 1)",
        "class Mine(http.server.ThreadingHTTPServer):\n    pass",
        "class Mine(socketserver.TCPServer):\n    pass",
        "with urllib.request.urlopen(url) as answer:\n    pass",
        "direct = urllib.request.build_opener()",
    ],
)
def test_the_check_of_the_sources_finds_what_does(source: str) -> None:
    assert uses(source)
