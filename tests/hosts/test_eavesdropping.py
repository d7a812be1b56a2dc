"""What a listener on a host's link sees of the training: gradients, unless Ray's TLS is on."""

import json

import pytest

from tests.hosts.cluster import ONE_EACH, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ONE_EACH
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


def heard(cluster: Cluster) -> dict[str, int]:
    """Step with a shard on the second host; return what a listener at its cable heard."""
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
    return said


def test_gradients_can_be_read_at_the_cable(hosts: Cluster) -> None:
    assert heard(hosts)["marks"] > 100


def test_where_rays_tls_is_on_no_gradient_can_be_read_at_the_cable(
    hosts_with_certificates: Cluster,
) -> None:
    assert heard(hosts_with_certificates)["marks"] == 0
