"""What a shard listens at, the loop of its connections, and what they count."""

import socket
from typing import Any

import numpy as np
import pytest

from distnadam.errors import LaneError
from distnadam.hyperparameters import NadamConfig
from distnadam.tensors.arrays import BFLOAT16
from distnadam.transport.loop_thread import LoopThread
from distnadam.transport.tcp_server import TcpServer
from distnadam.transport.traffic import Count, HostTraffic, host_traffic
from tests.transport.tcp_shards import PARAMS, Host, Shards, gradients, is_hung_up_on


def test_both_ends_count_the_bytes_to_and_from_each_host(shards: Shards) -> None:
    def moved() -> tuple[int, int]:
        return host_traffic().by_host().get("127.0.0.1", (0, 0))

    with socket.create_connection((shards.all[0].endpoint.host, shards.all[0].endpoint.port)) as no:
        before = moved()
        assert no.recv(4096), "its nonce"
        no.sendall(bytes(500))
        assert is_hung_up_on(no)
        assert moved() == before, "a stranger's bytes are nobody's"
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    begin = moved()
    for step in range(3):
        numbers = [worker.push(step + 1, gradients(step, worker.rank)) for worker in workers]
        for worker, number in zip(workers, numbers, strict=True):
            worker.collect(number)
    sent, received = (now - then for now, then in zip(moved(), begin, strict=True))
    payload = 3 * (2 + 1) * sum(array.nbytes for array in PARAMS.values())
    assert payload < sent == received < 1.01 * payload, "both ends are in this process"
    host.close()


@pytest.mark.parametrize("gradient", ["float32", "float16", BFLOAT16], ids=str)
@pytest.mark.parametrize("pull_dtype", [None, "bfloat16"])
def test_half_precision_takes_half_the_bytes_between_hosts_on_either_way(
    gradient: Any, pull_dtype: Any
) -> None:
    shards = Shards(NadamConfig(pull_dtype=pull_dtype))
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    begin = host_traffic().by_host()["127.0.0.1"][0]
    numbers = [worker.push(1, gradients(0, worker.rank, gradient)) for worker in workers]
    answers = [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]
    sent = host_traffic().by_host()["127.0.0.1"][0] - begin
    pushed, pulled = np.dtype(gradient), BFLOAT16 if pull_dtype else np.dtype(np.float32)
    elements = {space: array.size for space, array in PARAMS.items()}
    payload = elements["float32"] * (2 * pushed.itemsize + pulled.itemsize)
    payload += elements["float64"] * (2 * 8 + 8)  # gradients of both workers, parameters once
    assert payload < sent < payload + 4000
    for worker, answer in zip(workers, answers, strict=True):
        seen = worker.parameters(answer)["float32"]
        assert seen.dtype == pulled
        for shard in shards.all:
            begin, end = shard.spec.ranges["float32"]
            master = shard.host.shard.state.params["float32"]
            assert seen[begin:end].tobytes() == master.astype(pulled).tobytes()
    host.close()
    shards.close()


def test_what_a_connection_moved_still_counts_when_it_has_ended() -> None:
    traffic = HostTraffic()
    counts = [Count(sent=1, received=10), Count(sent=2, received=20), Count(sent=3, received=30)]
    for host, count in zip(("a", "b", "a"), counts, strict=True):
        traffic.begin(host, count)
    counts[2].sent += 5
    traffic.end(counts[0])
    traffic.end(Count(sent=99))
    assert traffic.by_host() == {"a": (9, 40), "b": (2, 20)}


def test_two_servers_do_not_take_one_port_and_a_range_is_kept(shards: Shards) -> None:
    spec = shards.all[0].spec
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with pytest.raises(LaneError, match=f"shard 0 cannot listen at 127.0.0.1: a port from {port}"):
        TcpServer(spec, lambda message, reply, run: None, "127.0.0.1", (port, port))
    taken.close()
    server = TcpServer(spec, lambda message, reply, run: None, "127.0.0.1", (port, port))
    assert server.endpoint.port == port
    server.close()


def test_a_loop_that_is_gone_takes_no_calls() -> None:
    thread = LoopThread()
    thread.close()
    called: list[int] = []
    thread.call(lambda: called.append(1))
    assert called == []
