"""The relay of a host without shards: real shards behind real sockets, real memory, all in here."""

import gc
import logging
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from distnadam.errors import Reconfigured, ShardLost, StaleEpoch, SupersededWorker
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Pause, Resume, RoundResult, TotalNorms, Write
from distnadam.tensors.arrays import cut_flat
from distnadam.transport import far_shard
from distnadam.transport.far_shard import FarShard, Reach
from distnadam.transport.relay import is_arena_of
from distnadam.transport.shared_memory import Arena
from tests.certificates import certificates
from tests.descriptors import MEMORY, descriptors_of
from tests.eventually import eventually
from tests.transport.tcp_shards import (
    ANSWER_S,
    CUTS,
    EPOCH,
    HANDSHAKE_BYTES,
    LAYOUT,
    PARAMS,
    Host,
    Proxy,
    Shards,
    Worker,
    gradients,
    is_hung_up_on,
    same,
    stepped_here,
)


@pytest.fixture
def host(shards: Shards) -> Iterator[Host]:
    host = Host(shards)
    yield host
    host.close()


def step(workers: list[Worker], round: int, dtype: Any = "float32") -> list[dict[int, Any]]:
    """Step once; return each worker's answers."""
    numbers = [w.push(round, gradients(round - 1, w.rank, dtype)) for w in workers]
    return [w.collect(number) for w, number in zip(workers, numbers, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_all_workers_of_a_host_read_the_bits_of_calls_where_the_relay_puts_them(
    dtype: Any, host: Host
) -> None:
    workers = [host.worker(0), host.worker(1)]
    for round in (1, 2, 3):
        answers = step(workers, round, dtype)
    for worker, each in zip(workers, answers, strict=True):
        assert {(answer.round, answer.outcome) for answer in each.values()} == {(3, "applied")}
        assert same(worker.parameters(each), stepped_here(3, dtype))
        assert worker.client.complete
    assert host.carried == []


def test_parameters_cross_the_cable_once_however_many_workers_a_host_has(shards: Shards) -> None:
    proxies = [Proxy(shard.endpoint) for shard in shards.all]
    host = Host(shards, {i: proxy.endpoint for i, proxy in enumerate(proxies)})
    workers = [host.worker(0), host.worker(1)]
    step(workers, 1)
    before = [dict(proxy.passed) for proxy in proxies]
    for round in (2, 3):
        step(workers, round)
    workers[0].pull()
    whole = sum(array.nbytes for array in PARAMS.values())
    there = sum(p.passed["there"] - b["there"] for p, b in zip(proxies, before, strict=True))
    back = sum(p.passed["back"] - b["back"] for p, b in zip(proxies, before, strict=True))
    assert 2 * whole <= back <= 1.01 * 2 * whole
    assert 2 * 2 * whole <= there <= 1.01 * 2 * 2 * whole
    host.close()


def test_with_rays_certificates_all_goes_by_tls_and_both_ends_ask_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in certificates(tmp_path).items():
        monkeypatch.setenv(name, value)
    shards = Shards()
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    for round in (1, 2, 3):
        answers = step(workers, round)
    assert same(workers[1].parameters(answers[1]), stepped_here(3))
    assert host.carried == []
    place = (shards.all[0].endpoint.host, shards.all[0].endpoint.port)
    with socket.create_connection(place, ANSWER_S) as stranger:
        stranger.sendall(bytes(500))
        assert stranger.recv(4096)[:1] in (b"", b"\x15"), "an alert of TLS, and no nonce"
    without = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    stranger = socket.create_connection(place, ANSWER_S)
    with without.wrap_socket(stranger, server_hostname="127.0.0.1") as secure:
        assert is_hung_up_on(secure), "no nonce for whom has no certificate"
    host.close()
    shards.close()


def test_certificates_that_cannot_be_read_are_named_and_the_last_resort_carries(
    shards: Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = stepped_here(1)
    for name, value in certificates(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(tmp_path / "other"))
    host = Host(shards)
    assert "RAY_USE_TLS is on, and its certificates cannot be used" in caplog.text
    workers = [host.worker(0), host.worker(1)]
    answers = step(workers, 1)
    assert same(workers[0].parameters(answers[0]), right)
    host.close()


def test_clipping_by_norm_takes_two_phases_through_the_relay() -> None:
    shards = Shards(NadamConfig(global_clipnorm=0.5))
    host = Host(shards)
    workers = [host.worker(0), host.worker(1)]
    for measured in step(workers, 1):
        assert {type(answer).__name__ for answer in measured.values()} == {"PartialNorms"}
    sums = [sum(float(a.sum()) for _, a in measured[index].sums) for index in (0, 1)]
    norms = [
        TotalNorms(
            epoch=EPOCH,
            rank=worker.rank,
            incarnation=worker.incarnation,
            round=1,
            square_sums=np.array([sums[0], sums[1]]),
        )
        for worker in workers
    ]
    numbers = [w.client.post({0: n, 1: n}) for w, n in zip(workers, norms, strict=True)]
    both = [w.collect(number) for w, number in zip(workers, numbers, strict=True)]
    assert {answer.outcome for each in both for answer in each.values()} == {"applied"}
    read = [w.parameters(each) for w, each in zip(workers, both, strict=True)]
    assert same(read[0], read[1]) and not same(read[0], PARAMS)
    host.close()
    shards.close()


def test_a_refusal_is_raised_and_the_connection_goes_on(shards: Shards, host: Host) -> None:
    workers = [host.worker(0), host.worker(1)]
    stale = {i: replace(p, epoch=0) for i, p in workers[0].pushes(1, gradients(0, 0)).items()}
    with pytest.raises(StaleEpoch):
        workers[0].collect(workers[0].client.post(stale))
    assert {a.round for a in step(workers, 1)[0].values()} == {1}
    shards.join(0)
    with pytest.raises(SupersededWorker):
        workers[0].collect(workers[0].push(2, gradients(1, 0)))
    assert host.carried == []


def test_what_a_round_waits_for_times_out_and_can_be_awaited_again(host: Host) -> None:
    workers = [host.worker(0), host.worker(1)]
    number = workers[0].push(1, gradients(0, 0))
    with pytest.raises(TimeoutError):
        workers[0].collect(number, 0.05)
    workers[1].push(1, gradients(0, 1))
    assert {a.round for a in workers[0].collect(number).values()} == {1}


@pytest.mark.parametrize("back", [False, True], ids=["on the way there", "on the way back"])
@pytest.mark.parametrize("after", [0, 1, 11, 12, 40, 4000, 599_000, 1_300_000])
def test_a_line_that_is_reset_at_any_byte_costs_no_bit_and_nothing_counts_twice(
    after: int, back: bool, shards: Shards
) -> None:
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + after, back=back)
    host = Host(shards, {0: proxy.endpoint})
    workers = [host.worker(0), host.worker(1)]
    for round in (1, 2, 3):
        answers = step(workers, round)
    assert proxy.passed["back" if back else "there"] == HANDSHAKE_BYTES + after, "it was reset"
    for worker, each in zip(workers, answers, strict=True):
        assert {answer.round for answer in each.values()} == {3}
        assert same(worker.parameters(each), stepped_here(3))
    assert {index for index, _ in host.carried} == {0}
    host.close()


def test_a_line_that_ended_is_opened_anew_beside_the_steps(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(far_shard, "_REOPEN_S", 0.05)
    caplog.set_level(logging.INFO, "distnadam")
    proxy = Proxy(shards.all[0].endpoint, HANDSHAKE_BYTES + 4000)
    host = Host(shards, {0: proxy.endpoint})
    workers = [host.worker(0), host.worker(1)]
    host.endpoints[0] = shards.all[0].endpoint  # another port, as after a restart
    step(workers, 1)
    assert caplog.text.count("the connection to shard 0 has ended") == 1
    eventually(lambda: host.relay.is_by_tcp(0))
    carried = len(host.carried)
    assert carried > 0
    for round in (2, 3):
        answers = step(workers, round)
    assert len(host.carried) == carried
    assert same(workers[0].parameters(answers[0]), stepped_here(3))
    host.close()


def test_a_port_that_cannot_be_reached_is_named_once_with_a_remedy(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(far_shard, "_REOPEN_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    host = Host(shards, {1: replace(shards.all[1].endpoint, port=port)})
    workers = [host.worker(0), host.worker(1)]
    answers = step(workers, 1)
    assert same(workers[0].parameters(answers[0]), stepped_here(1))
    shard = host.relay._shards[1]
    eventually(lambda: shard._reopen_s >= 0.16)  # less and less often
    assert caplog.text.count(f"shard 1 cannot be reached at 127.0.0.1 port {port}: ") == 1
    assert caplog.text.count("Ray objects are used instead") == 1
    assert "Options(port_range=...)" in caplog.text
    host.close()


def test_a_relay_begins_with_nothing_and_fetches_before_it_lets_anyone_read(
    shards: Shards, host: Host
) -> None:
    workers = [host.worker(0), host.worker(1)]
    for round in (1, 2):
        step(workers, round)
    host.close()
    with pytest.raises(ShardLost):
        workers[0].collect(workers[0].push(3, gradients(2, 0)))
    successor = Host(shards)
    again = [successor.worker(w.rank, w.incarnation) for w in workers]
    answers = again[0].pull()
    assert same(again[0].parameters(answers), stepped_here(2))
    answers = step(again, 3)[1]
    assert same(again[1].parameters(answers), stepped_here(3))
    successor.close()


def test_what_replaced_the_parameters_is_fetched_by_the_next_pull(
    shards: Shards, host: Host
) -> None:
    workers = [host.worker(0), host.worker(1)]
    step(workers, 1)
    new = {space: array + 1 for space, array in PARAMS.items()}
    for shard in shards.all:
        shard.host.send(Pause("me")).result(ANSWER_S)
        state = {"params": cut_flat(new, shard.spec.ranges)}
        shard.host.send(Write(token="me", state=state)).result(ANSWER_S)
        shard.host.send(Resume("me")).result(ANSWER_S)
    for worker in workers:
        assert same(worker.parameters(worker.pull()), new)


def test_the_end_of_a_worker_and_a_departure_are_told_to_the_shards(
    shards: Shards, host: Host
) -> None:
    workers = [host.worker(0), host.worker(1)]
    step(workers, 1)
    for index in (0, 1):
        workers[0].client.drop(index)  # as the end of its process does
    workers[1].client.close()
    for shard in shards.all:
        eventually(lambda shard=shard: shard.describe().dead == (0,))  # type: ignore[misc]
        eventually(lambda shard=shard: shard.describe().left == (1,))  # type: ignore[misc]
    eventually(lambda: host.relay.num_connections == 0)


def test_a_worker_that_dies_after_its_push_is_counted_from_its_memory(
    shards: Shards, host: Host
) -> None:
    workers = [host.worker(0), host.worker(1)]
    workers[0].push(1, gradients(0, 0))
    for index in (0, 1):
        workers[0].client.drop(index)
    answers = workers[1].collect(workers[1].push(1, gradients(0, 1)))
    assert same(workers[1].parameters(answers), stepped_here(1))


def test_the_next_worker_of_a_rank_replaces_the_former_on_the_same_line(
    shards: Shards, host: Host
) -> None:
    workers = [host.worker(0), host.worker(1)]
    step(workers, 1)
    workers[0] = host.worker(0)
    answers = step(workers, 2)
    assert same(workers[0].parameters(answers[0]), stepped_here(2))


class Held:
    """A shard whose last resort answers when the test says so."""

    def __init__(self, shards: Shards) -> None:
        self.asked: list[Any] = []
        self.arena = Arena.create(LAYOUT.sizes, copies=2)
        self.far = FarShard(
            shards.all[0].spec, self.arena, Reach(find=self._none, carry=self._carry), "here"
        )
        self.worker = Worker(0, 1)
        self.worker.client.open(0, self.far.address)

    def _none(self) -> Any:
        raise TimeoutError

    def _carry(self, message: Any, reply: Any) -> None:
        self.asked.append(reply)

    def ask(self) -> int:
        count = len(self.asked)
        number = self.worker.client.post({0: self.worker.pushes(1, gradients(0, 0))[0]})
        eventually(lambda: len(self.asked) > count)
        return number

    def answer(self, which: int, round: int, buffer: int) -> None:
        values = {
            space: np.full(end - begin, round, space) for space, (begin, end) in CUTS[0].items()
        }
        self.asked[which](
            RoundResult(
                epoch=1,
                round=round,
                iterations=round,
                outcome="applied",
                rejection=None,
                lr=0.1,
                buffer=buffer,
                parameters=values,
            )
        )

    def collect(self, number: int) -> Any:
        return self.worker.client.collect(number, 1, time.monotonic() + ANSWER_S)[0]


def test_an_answer_older_than_what_has_come_is_not_read_but_asked_again(shards: Shards) -> None:
    held = Held(shards)
    held.ask()
    number = held.ask()
    held.answer(1, 3, 1)
    assert held.collect(number).round == 3
    number = held.ask()
    held.answer(2, 1, 1)  # it was late: its buffer is that of round 3 by now
    with pytest.raises(Reconfigured, match="newer parameters than those of round 1"):
        held.collect(number)
    assert held.worker.client.parameters[1]["float32"][0] == 3
    held.far.close()


def test_the_memory_of_a_neighbour_is_told_from_any_other(shards: Shards, host: Host) -> None:
    address = host.relay.address(0)
    assert is_arena_of(host.arena, address)
    assert not is_arena_of(Arena.create(LAYOUT.sizes, copies=2), address)


def test_a_shard_that_is_replaced_leaves_no_memory_behind(shards: Shards) -> None:
    """Whatever still refers to what stood for it: a garbage collection may be far away."""
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(4):
            host = Host(shards)
            workers = [host.worker(0), host.worker(1)]
            for worker in workers:
                worker.push(1, gradients(0, worker.rank))
            host.close()
            for worker in workers:
                worker.client.close()
            del host.arena, host.relay, host, workers, worker  # the last resort refers to the host
            counts.append(descriptors_of(os.getpid())[MEMORY])
        assert len(set(counts[1:])) == 1, counts  # a frame or thread may still hold the last
    finally:
        gc.enable()


def test_what_is_said_of_a_line_is_not_repeated(
    shards: Shards, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distnadam")
    host = Host(shards)
    port = shards.all[0].endpoint.port
    assert caplog.text.count(f"shard 0 is reached by TCP at 127.0.0.1 port {port}") == 1
    host.close()
