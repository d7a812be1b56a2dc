"""TCP between a worker and shards of other hosts: real shards behind real sockets, all in here."""

import socket
import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from distnadam.config import NadamConfig
from distnadam.errors import LaneError, StaleEpoch, SupersededWorker
from distnadam.protocol.messages import Push, TotalNorms
from distnadam.tensors.arrays import BFLOAT16, Flat, cut_flat
from distnadam.tensors.layout import sizes_of
from distnadam.transport.loop_thread import LoopThread
from distnadam.transport.tcp_server import TcpServer
from distnadam.transport.traffic import Count, HostTraffic, host_traffic
from tests.certificates import certificates
from tests.transport.tcp_shards import (
    ANSWER_S,
    CUTS,
    EPOCH,
    HANDSHAKE_BYTES,
    PARAMS,
    Proxy,
    Shards,
    Worker,
    gradients,
    is_hung_up_on,
    same,
)


def stepped_here(num_rounds: int, dtype: Any = "float32", **how: Any) -> list[Flat]:
    """Return each shard's parameters after the same pushes by calls."""
    ends = []
    shards = Shards(NadamConfig(**how))
    incarnations = [shards.join(0), shards.join(1)]
    for shard in shards.all:
        for step in range(num_rounds):
            futures = [
                shard.host.send(
                    Push(
                        epoch=EPOCH,
                        rank=rank,
                        incarnation=incarnations[rank],
                        round=step + 1,
                        gradients=cut_flat(gradients(step, rank, dtype), shard.spec.ranges),
                        want_parameters=True,
                    )
                )
                for rank in (0, 1)
            ]
            answers = [future.result(ANSWER_S) for future in futures]
        ends.append({space: array.copy() for space, array in answers[0].parameters.items()})
        shard.close()
    return ends


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_pushes_over_tcp_give_the_bits_of_calls_to_every_worker(dtype: Any, shards: Shards) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    for step in range(3):
        numbers = [worker.push(step + 1, gradients(step, worker.rank, dtype)) for worker in workers]
        answers = [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]
    right = stepped_here(3, dtype)
    for each in answers:
        for index in (0, 1):
            assert (each[index].round, each[index].outcome) == (3, "applied")
            assert same(each[index].parameters, right[index])


def test_both_ends_count_the_bytes_to_and_from_each_host(shards: Shards) -> None:
    def moved() -> tuple[int, int]:
        return host_traffic().by_host().get("127.0.0.1", (0, 0))

    with socket.create_connection((shards.all[0].endpoint.host, shards.all[0].endpoint.port)) as no:
        before = moved()
        assert no.recv(4096), "its nonce"
        no.sendall(bytes(500))
        assert is_hung_up_on(no)
        assert moved() == before, "a stranger's bytes are nobody's"
    workers = [shards.worker(0), shards.worker(1)]
    begin = moved()
    for step in range(3):
        numbers = [worker.push(step + 1, gradients(step, worker.rank)) for worker in workers]
        for worker, number in zip(workers, numbers, strict=True):
            worker.collect(number)
    sent, received = (now - then for now, then in zip(moved(), begin, strict=True))
    payload = 2 * 3 * 2 * sum(array.nbytes for array in PARAMS.values())
    assert payload < sent == received < 1.01 * payload, "both ends are in this process"
    for worker in workers:
        worker.client.close()


@pytest.mark.parametrize("gradient", ["float32", "float16", BFLOAT16], ids=str)
@pytest.mark.parametrize("pull_dtype", [None, "bfloat16"])
def test_half_precision_takes_half_the_bytes_between_hosts_on_either_way(
    gradient: Any, pull_dtype: Any
) -> None:
    shards = Shards(NadamConfig(pull_dtype=pull_dtype))
    workers = [shards.worker(0), shards.worker(1)]
    begin = host_traffic().by_host()["127.0.0.1"][0]
    numbers = [worker.push(1, gradients(0, worker.rank, gradient)) for worker in workers]
    answers = [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]
    sent = host_traffic().by_host()["127.0.0.1"][0] - begin
    pushed, pulled = np.dtype(gradient), BFLOAT16 if pull_dtype else np.dtype(np.float32)
    elements = {space: 2 * array.size for space, array in PARAMS.items()}  # of both workers
    payload = elements["float32"] * (pushed.itemsize + pulled.itemsize) + elements["float64"] * 16
    assert payload < sent < payload + 4000
    for shard in shards.all:
        master = shard.host.shard.state.params["float32"]
        for answer in answers:
            seen = answer[shard.spec.index].parameters["float32"]
            assert seen.dtype == pulled and seen.tobytes() == master.astype(pulled).tobytes()
        shard.close()


def test_what_a_connection_moved_still_counts_when_it_has_ended() -> None:
    traffic = HostTraffic()
    counts = [Count(sent=1, received=10), Count(sent=2, received=20), Count(sent=3, received=30)]
    for host, count in zip(("a", "b", "a"), counts, strict=True):
        traffic.begin(host, count)
    counts[2].sent += 5
    traffic.end(counts[0])
    traffic.end(Count(sent=99))
    assert traffic.by_host() == {"a": (9, 40), "b": (2, 20)}


def test_with_rays_certificates_all_goes_by_tls_and_both_ends_ask_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in certificates(tmp_path).items():
        monkeypatch.setenv(name, value)
    shards = Shards()
    workers = [shards.worker(0), shards.worker(1)]
    for step in range(3):
        numbers = [worker.push(step + 1, gradients(step, worker.rank)) for worker in workers]
        answers = [worker.collect(number) for worker, number in zip(workers, numbers, strict=True)]
    assert all(
        same(each[index].parameters, stepped_here(3)[index]) for each in answers for index in (0, 1)
    )
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with socket.create_connection(place, ANSWER_S) as stranger:
        stranger.sendall(bytes(500))
        assert stranger.recv(4096)[:1] in (b"", b"\x15"), "an alert of TLS, and no nonce"
    without = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    stranger = socket.create_connection(place, ANSWER_S)
    with without.wrap_socket(stranger, server_hostname="127.0.0.1") as secure:
        assert is_hung_up_on(secure), "no nonce for whom has no certificate"
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(tmp_path / "other"))
    with pytest.raises(LaneError, match="RAY_USE_TLS is on, and its certificates cannot be used"):
        Worker(1, 1).client.open(0, shards.all[0].endpoint, CUTS[0])
    shards.close()


def test_clipping_by_norm_takes_two_phases_over_tcp() -> None:
    shards = Shards(NadamConfig(global_clipnorm=0.5))
    workers = [shards.worker(0), shards.worker(1)]
    numbers = [worker.push(1, gradients(0, worker.rank)) for worker in workers]
    for worker, number in zip(workers, numbers, strict=True):
        measured = worker.collect(number)
        assert {type(answer).__name__ for answer in measured.values()} == {"PartialNorms"}
    sums = [sum(float(a.sum()) for _, a in measured[index].sums) for index in (0, 1)]
    norms = {
        worker.rank: TotalNorms(
            epoch=EPOCH,
            rank=worker.rank,
            incarnation=worker.incarnation,
            round=1,
            square_sums=np.array([sums[0], sums[1]]),
            want_parameters=True,
        )
        for worker in workers
    }
    numbers = [worker.client.post(dict.fromkeys((0, 1), norms[worker.rank])) for worker in workers]
    for worker, number in zip(workers, numbers, strict=True):
        for index, answer in worker.collect(number).items():
            assert answer.outcome == "applied"
            assert answer.parameters["float64"].shape == (sizes_of(CUTS[index])["float64"],)
    shards.close()


def test_a_refusal_is_raised_and_the_connection_goes_on(shards: Shards) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    stale = {i: replace(p, epoch=0) for i, p in workers[0].pushes(1, gradients(0, 0)).items()}
    with pytest.raises(StaleEpoch):
        workers[0].collect(workers[0].client.post(stale))
    numbers = [worker.push(1, gradients(0, worker.rank)) for worker in workers]
    assert {a.round for a in workers[0].collect(numbers[0]).values()} == {1}
    shards.join(0)
    with pytest.raises(SupersededWorker):
        workers[0].collect(workers[0].push(2, gradients(1, 0)))


def test_what_a_round_waits_for_times_out_and_can_be_awaited_again(shards: Shards) -> None:
    workers = [shards.worker(0), shards.worker(1)]
    number = workers[0].push(1, gradients(0, 0))
    with pytest.raises(TimeoutError):
        workers[0].collect(number, 0.05)
    workers[1].push(1, gradients(0, 1))
    assert {a.round for a in workers[0].collect(number).values()} == {1}


@pytest.mark.parametrize("after", [0, 1, 11, 12, 40, 4000, 599_000])
def test_a_connection_that_is_reset_at_any_byte_is_lost_and_its_push_not_counted(
    after: int, shards: Shards
) -> None:
    worker, other = Worker(0, shards.join(0)), shards.worker(1)
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + after, "reset")
    worker.client.open(0, proxy.endpoint, CUTS[0])
    worker.client.open(1, shards.all[1].endpoint, CUTS[1])
    begun = other.push(1, gradients(0, 1))
    answers = worker.collect(worker.push(1, gradients(0, 0)))
    assert answers[0] is None and 0 not in worker.client
    assert answers[1].round == 1
    assert shards.round(0) == 0, "half a push counts as none"
    message = worker.pushes(1, gradients(0, 0))[0]
    assert shards.all[0].host.send(message).result(ANSWER_S).round == 1  # as the fallback sends it
    assert {a.round for a in other.collect(begun).values()} == {1}


def test_a_push_that_is_still_being_sent_is_given_up_before_its_memory_changes() -> None:
    shards = Shards()
    worker = Worker(0, shards.join(0))
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + 20, "halt")
    worker.client.open(0, proxy.endpoint, CUTS[0])
    big = np.zeros(1 << 24, np.float32)  # more than all buffers on the way
    message = replace(worker.pushes(1, gradients(0, 0))[0], gradients={"float32": big})
    number = worker.client.post({0: message})
    with pytest.raises(TimeoutError):
        worker.client.collect(number, {0: None}, time.monotonic() + 0.2)
    assert 0 in worker.client
    worker.client.post(worker.pushes(1, gradients(0, 0)))
    assert 0 not in worker.client
    proxy.release.set()
    shards.close()


def test_two_servers_do_not_take_one_port_and_a_range_is_kept() -> None:
    shards = Shards()
    spec = shards.all[0].spec
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with pytest.raises(LaneError, match=f"shard 0 cannot listen at 127.0.0.1: a port from {port}"):
        TcpServer(spec, lambda message, reply, run: None, "127.0.0.1", (port, port))
    taken.close()
    server = TcpServer(spec, lambda message, reply, run: None, "127.0.0.1", (port, port))
    assert server.endpoint.port == port
    server.close()
    shards.close()


def test_a_loop_that_is_gone_takes_no_calls() -> None:
    thread = LoopThread()
    thread.close()
    thread.call(print)
