"""The sockets and memory of a real optimizer, against another user of the host who knows names and
tokens.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray

from distnadam import DistNadam
from distnadam.errors import LaneError
from distnadam.transport.shared_memory import Arena
from distnadam.transport.unix_connection import Address, connect
from distnadam.worker import Worker
from tests.security.strangers import NOBODY, as_nobody, as_root, can_hide

pytestmark = as_root
GRADIENTS = {"w": np.ones(5000, np.float32)}
CONNECT = """
for name, token in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        connect(Address(name, token), {"rank": None}, [])
    except LaneError as error:
        print(error)
    raw = socket.socket(socket.AF_UNIX)
    raw.connect("\\0" + name)
    try:
        raw.sendall(b"x" * 100)
        print(socket.recv_fds(raw, 100, 4)[:2])
    except ConnectionError as error:
        print("hung up")
"""
PEEP = """
DENIED = PermissionError, FileNotFoundError  # the second where /proc hides others' processes
for pid in sys.argv[1:]:
    for what in ("fd", "map_files", "environ", "maps", "mem"):
        path = f"/proc/{pid}/{what}"
        try:
            os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
        except DENIED:
            continue
        print("read", path)
    for number in range(3, 100):
        for how in (os.O_RDONLY, os.O_RDWR):
            try:
                os.open(f"/proc/{pid}/fd/{number}", how)
            except DENIED:
                continue
            print("opened", pid, number)
print("names", sum("@distnadam-" in line for line in open("/proc/net/unix")) > 0)
"""
LISTEN = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0distnadam-fake-" + sys.argv[1])
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
try:
    print(socket.recv_fds(connection, 1000, 4)[:2])
except ConnectionError:
    print("(b'', [])")
"""


def memory_of(pid: int) -> list[str]:
    found = []
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return [path for path in found if path.startswith("/memfd:distnadam")]


@pytest.fixture(scope="module")
def worker(ray_cluster: None, one_process: None) -> Iterator[tuple[DistNadam, Worker]]:
    with (
        DistNadam(num_shards=2, backend="ray").build(GRADIENTS) as optimizer,
        optimizer.worker(0) as worker,
    ):
        worker.step(GRADIENTS)
        yield optimizer, worker


def test_another_user_who_knows_names_and_tokens_gets_no_connection_and_no_memory(
    worker: tuple[DistNadam, Worker],
) -> None:
    optimizer, mine = worker
    addresses = [address.socket for address in optimizer.shards.backend.addresses]  # type: ignore[attr-defined]
    said = as_nobody(
        "import socket, sys\nfrom distnadam.errors import LaneError\nfrom "
        "distnadam.transport.unix_connection import Address, connect",
        CONNECT,
        *(part for address in addresses for part in (address.name, address.token)),
    )
    assert said.count(f"runs as user 0, this one as {NOBODY}") == 2, said
    assert said.count("hung up") + said.count("(b'', [])") == 2, said
    before = optimizer.iterations
    mine.step(GRADIENTS)
    assert optimizer.iterations == before + 1


def test_another_user_cannot_open_the_memory_nor_read_the_processes(
    worker: tuple[DistNadam, Worker],
) -> None:
    optimizer, _ = worker
    actors = optimizer.shards.backend.actors  # type: ignore[attr-defined]
    pids = [
        os.getpid(),
        *(int(facts["pid"]) for facts in ray.get([actor.about.remote() for actor in actors])),
    ]
    assert all(memory_of(pid) for pid in pids), "there is something to be opened"
    for hiding in (False, True)[: 1 + can_hide()]:
        said = as_nobody("import os, sys", PEEP, *pids, hiding=hiding)
        assert said == "names True\n", "names are no secret, and nothing else can be read"


def test_a_worker_hands_its_memory_to_no_other_user_who_listens_under_a_shards_name(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, tmp_path.name], stdout=subprocess.PIPE, text=True
    ) as fake:
        assert fake.stdout is not None
        assert fake.stdout.readline() == "ready\n"
        arena = Arena.create({"float32": 100})
        with pytest.raises(LaneError, match=f"runs as user {NOBODY}, this one as 0"):
            connect(
                Address(f"distnadam-fake-{tmp_path.name}", "token"),
                {"rank": 0, "incarnation": 1},
                [arena.fd],
            )
        assert fake.stdout.read() == "(b'', [])\n", "neither token nor memory"


def test_names_and_tokens_are_not_to_be_guessed_and_end_with_the_optimizer(
    ray_cluster: None,
) -> None:
    with DistNadam(num_shards=2, backend="ray").build(GRADIENTS) as optimizer:
        addresses = [address.socket for address in optimizer.shards.backend.addresses]  # type: ignore[attr-defined]
        names = {
            line.rpartition("@")[2]
            for line in Path("/proc/net/unix").read_text().splitlines()
            if "@distnadam-" in line
        }
        assert names >= {address.name for address in addresses}
    assert len({a.name for a in addresses} | {a.token for a in addresses}) == 4
    assert all(len(a.token) == 32 and len(a.name) == len("distnadam-") + 32 for a in addresses)
    while "@" + addresses[0].name in Path("/proc/net/unix").read_text():
        pass  # the test's own time limit bounds it
