"""What a listener on a host's link sees of the training: gradients, unless Ray's TLS is on."""

import json
from pathlib import Path

import pytest

from tests.certificates import certificates
from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = [{"CPU": 1}, {"CPU": 1, "shard": 1}]
SIZE = 500_000
LISTEN = """
import select, socket, sys
import numpy as np
from tests.hosts.program import say

size = int(sys.argv[1])
# as tests.hosts.stepping pushes it
gradient = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
marks = {gradient[at : at + 8].tobytes() for at in range(0, size - 8, size // 200)}
ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
# SO_RCVBUFFORCE, so that the kernel drops no packet that arrives meanwhile
ear.setsockopt(socket.SOL_SOCKET, 33, 128 << 20)
ear.bind(("eth0", 0))
say(listening=True)
packets = []
while sys.stdin not in (ready := select.select([ear, sys.stdin], [], [])[0]) or ear in ready:
    packets.append(ear.recv(1 << 17))
heard = sum(any(mark in packet for packet in packets) for mark in marks)
say(heard=sum(map(len, packets)), marks=heard)
"""
"""Records all packets until a line of input, then prints their bytes and the gradient's pieces."""


@pytest.mark.parametrize("tls", [False, True])
def test_gradients_can_be_read_at_the_cable_unless_rays_tls_is_on(
    tls: bool, tmp_path: Path
) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    (tmp_path / "keys").mkdir()
    with Cluster(
        tmp_path, RESOURCES, env=certificates(tmp_path / "keys") if tls else {}
    ) as cluster:
        listener = cluster.python(cluster.hosts[1], "-c", LISTEN, SIZE)
        listener.first("listening")
        about = {"size": SIZE, "num_shards": 1, "steps": 3}
        program = cluster.python(cluster.hosts[0], "-m", "tests.hosts.stepping", json.dumps(about))
        program.first("warm")
        program.tell("go on")
        program.first("median_s")
        program.tell("end")
        program.finish()
        listener.tell("enough")
        said = listener.first("heard")
        listener.finish()
    assert said["heard"] > 3 * 4 * SIZE, "each step's gradient passed"
    assert said["marks"] == 0 if tls else said["marks"] > 100
