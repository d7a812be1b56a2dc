"""Rounds that a shard takes ahead of their counting are, to everyone, those it takes one by one."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders
from distnadam.errors import ConfigError, DistNadamError
from distnadam.hyperparameters import NadamConfig
from distnadam.runtime.rounds_ahead import RoundsAhead
from distnadam.runtime.shard_kernel import StepsAhead
from distnadam.runtime.standby import Standby
from distnadam.shard.state import ShardState
from distnadam.transport import shm_channel, shm_server, unix_connection
from distnadam.transport.shm_replication import ShmReplicationStream, StandbyReceiver
from distnadam.transport.state_memory import copies_in, reserve_state
from tests.transport.shm_shards import Client, Shard, Shards

ROUNDS = 12
"""Before something happens, more than are taken one by one first."""


class Run:
    """Two workers' rounds, and all that anybody was told, as a log."""

    def __init__(self, *, at_once: bool, **given: Any) -> None:
        self.may_send = True
        self.shards = Shards(at_once=at_once, can_send=lambda: self.may_send, **given)
        self.clients = [self.shards.client(rank) for rank in range(2)]
        self.round = 0
        self.log: list[Any] = []

    def push(self, rank: int) -> int:
        client = self.clients[rank]
        value = (self.round + 1) * (1.0 + rank) / 7
        return client.push(value, round=self.round + 1)

    def told(self, ask: Callable[[], Any]) -> None:
        try:
            self.log.append(ask())
        except (DistNadamError, TimeoutError) as error:
            self.log.append(f"{type(error).__name__}: {error}")

    def collect(self, rank: int, number: int, timeout_s: float = 60.0) -> None:
        client = self.clients[rank]
        self.told(lambda: sorted(client.collect(number, timeout_s=timeout_s).items()))

    def rounds(self, count: int = 1) -> None:
        for _ in range(count):
            numbers = [self.push(rank) for rank in range(2)]
            for rank, number in enumerate(numbers):
                self.collect(rank, number)
            self.round += 1

    def send(self, message: Any) -> None:
        for shard in self.shards.all:
            self.told(shard.host.send(message).result)

    def bits(self, shard: Shard) -> dict[str, Any]:
        state = shard.host.shard.state.arrays()
        return {n: {s: a.tobytes() for s, a in flat.items()} for n, flat in state.items()}

    def ended(self) -> list[Any]:
        """All that was told, and the shards' states."""
        states = []
        for shard in self.shards.all:
            description = replace(shard.describe(), idle_s=0.0, stepped_s=0.0)
            states.append((description, shard.host.control_state, self.bits(shard)))
        return [*self.log, *states]


def described(run: Run) -> None:
    run.log += [shard.describe().round for shard in run.shards.all]


def described_between_the_pushes(run: Run) -> None:
    first = run.push(0)
    run.log += [shard.describe().round for shard in run.shards.all]
    second = run.push(1)
    run.collect(1, second)
    run.collect(0, first)
    run.round += 1


def paused(run: Run) -> None:
    run.send(msg.Pause("us"))
    numbers = [run.push(rank) for rank in range(2)]
    run.collect(0, numbers[0], timeout_s=0.1)
    run.send(msg.Resume("us"))
    for rank, number in enumerate(numbers):
        run.collect(rank, number)
    run.round += 1


def written(run: Run) -> None:
    run.send(msg.Pause("us"))
    for shard in run.shards.all:
        state = {"m": {s: a + 1 for s, a in shard.host.shard.state.m.items()}}
        run.told(shard.host.send(msg.Write(token="us", state=state)).result)
    run.send(msg.Resume("us"))
    numbers = [run.push(rank) for rank in range(2)]
    for rank, number in enumerate(numbers):
        run.collect(rank, number)  # refused: a new epoch has begun


def configured(run: Run) -> None:
    run.send(msg.Pause("us"))
    run.send(msg.SetConfig("us", NadamConfig(lr=0.5), 1))
    run.send(msg.Resume("us"))


def taken_over(run: Run) -> None:
    old, run.clients[0] = run.clients[0], run.shards.client(0)
    run.told(lambda: old.collect(old.push(1.0, round=run.round + 1)))


def pulled(run: Run) -> None:
    client = run.clients[1]
    pull = msg.Pull(rank=1, incarnation=client.incarnation)
    number = client.shm.post({0: pull, 1: pull})
    run.collect(1, number)


def dead(run: Run) -> None:
    for each in list(run.clients[1].shm._connections.values()):
        each.close()
    run.shards.wait("dead")
    run.clients[1] = Client(1, run.shards.join(1))
    for index, shard in enumerate(run.shards.all):
        run.clients[1].shm.open(index, shard.server.address)


def reconfigured(run: Run) -> None:
    schedule = ((run.round + 1, (0, 1)),)
    run.send(orders.Reconfigure(epoch=7, schedule=schedule, newest={}))
    numbers = [run.push(rank) for rank in range(2)]
    for rank, number in enumerate(numbers):
        run.collect(rank, number)


def retired(run: Run) -> None:
    run.send(orders.Retire(epoch=9))
    numbers = [run.push(rank) for rank in range(2)]
    for rank, number in enumerate(numbers):
        run.collect(rank, number)


def without_a_lease(run: Run) -> None:
    run.may_send = False
    numbers = [run.push(rank) for rank in range(2)]
    run.collect(0, numbers[0], timeout_s=0.1)
    run.may_send = True
    for shard in run.shards.all:
        shard.host.resume()
    for rank, number in enumerate(numbers):
        run.collect(rank, number)
    run.round += 1


def rejected(run: Run) -> None:
    client = run.clients[0]
    push = msg.Push(
        epoch=1,
        rank=0,
        incarnation=client.incarnation,
        round=run.round + 1,
        gradients=None,
        rejection="rank 0: NaN",
    )
    first = client.shm.post({0: push, 1: push})
    second = run.push(1)
    run.collect(0, first)
    run.collect(1, second)
    run.round += 1


def many_more(run: Run) -> None:
    run.rounds(4 * ROUNDS)  # than are prepared for at a time


HAPPENINGS = [
    described,
    described_between_the_pushes,
    paused,
    written,
    configured,
    taken_over,
    pulled,
    dead,
    reconfigured,
    retired,
    without_a_lease,
    rejected,
    many_more,
]


@pytest.fixture
def runs() -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(**given: Any) -> Run:
        made.append(Run(**given))
        return made[-1]

    yield make
    for run in made:
        run.shards.close()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each round that was offered was taken ahead: they are awaited for longer than else,
    so that some are wherever this runs.
    """
    monkeypatch.setattr(unix_connection, "_AWAITED", struct.pack("@ll", 0, 500_000))
    monkeypatch.setattr(shm_server, "AWAIT_S", 0.5)
    taken: list[bool] = []
    take = RoundsAhead.take

    def watched(self: RoundsAhead, frames: Any) -> Any:
        answers = take(self, frames)
        taken.append(answers is not None)
        return answers

    monkeypatch.setattr(RoundsAhead, "take", watched)
    return taken


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_whatever_happens_everybody_is_told_the_same(
    runs: Callable[..., Run], ahead: list[bool], happening: Callable[[Run], None]
) -> None:
    ends = []
    for at_once in (False, True):
        run = runs(at_once=at_once)
        run.rounds(ROUNDS)
        happening(run)
        if happening not in (written, reconfigured, retired):
            run.rounds(ROUNDS)
        ends.append(run.ended())
        assert any(ahead) is at_once
    assert ends[0] == ends[1]


class Followed:
    """A standby of the same machine for a shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard, spec = shard, shard.spec
        self.standby = Standby(spec, 1)
        self._receiver = StandbyReceiver(spec, self.standby.map_states, self.standby.apply)
        shard.host.connect_standby = self._connect
        shard.host.send(orders.AttachStandby("a standby")).result()

    def _connect(
        self,
        _: Any,
        control: orders.ShardControlState,
        config: NadamConfig,
        state: ShardState,
    ) -> ShmReplicationStream:
        memory = reserve_state(self._shard.spec)
        state.keep_twice(copies_in(memory, self._shard.spec))
        to = self._receiver.address, memory, self._shard.arena
        stream = ShmReplicationStream(*to, control.round, 60.0)
        self.standby.begin(control, config)
        return stream

    def ended(self) -> tuple[orders.ShardControlState, dict[str, Any]]:
        """What the standby has once it has the last round."""
        last = self._shard.describe().round
        while self.standby.reached != last:
            pass  # the test's time limit bounds it
        found = self.standby.control_state
        assert found is not None
        arrays = self.standby.arrays
        return found, {n: {s: a.tobytes() for s, a in f.items()} for n, f in arrays.items()}

    def close(self) -> None:
        self._receiver.close()


def test_a_standby_has_every_round_before_it_is_answered(
    runs: Callable[..., Run], ahead: list[bool]
) -> None:
    ends = []
    for at_once in (False, True):
        run = runs(at_once=at_once)
        followed = [Followed(shard) for shard in run.shards.all]
        run.rounds(2 * ROUNDS + at_once)
        described(run)
        run.rounds(2 * ROUNDS + 1 - at_once)
        for each, shard in zip(followed, run.shards.all, strict=True):
            control, bits = each.ended()
            assert replace(control, highest_round=control.round) == shard.host.control_state
            assert bits == run.bits(shard)
            each.close()
        run.log.clear()
        ends.append(run.ended())
    assert ends[0] == ends[1] and any(ahead)


def test_a_standby_that_is_lost_leaves_the_rounds_to_go_on(
    runs: Callable[..., Run], ahead: list[bool]
) -> None:
    run = runs(at_once=True)
    followed = [Followed(shard) for shard in run.shards.all]
    run.rounds(ROUNDS)
    assert any(ahead)
    for each in followed:
        each.close()
    run.rounds(2 * ROUNDS)
    assert [shard.describe().replicated for shard in run.shards.all] == [None, None]
    alone = runs(at_once=False)
    alone.rounds(3 * ROUNDS)
    assert list(map(run.bits, run.shards.all)) == list(map(alone.bits, alone.shards.all))


def test_threads_that_spin_take_rounds_ahead_too(
    runs: Callable[..., Run], ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for at_once in (False, True):
        for module in (shm_server, shm_channel):
            monkeypatch.setattr(module, "has_free_cores", lambda processes: True)
        run = runs(at_once=at_once)
        run.rounds(2 * ROUNDS)
        ends.append(run.ended())
    assert ends[0] == ends[1] and any(ahead)


def test_a_learning_rate_that_cannot_be_had_refuses_its_round_alone(
    runs: Callable[..., Run], ahead: list[bool]
) -> None:
    def rate(step: int) -> float:
        if step == ROUNDS:
            raise ConfigError("no rate")
        return 0.1 / (1 + step)

    ends = []
    for at_once in (False, True):
        run = runs(at_once=at_once, config=NadamConfig(lr=rate))
        run.rounds(ROUNDS)
        numbers = [run.push(rank) for rank in range(2)]
        for rank, number in enumerate(numbers):
            run.collect(rank, number)
        assert "no rate" in str(run.log[-1])
        ends.append(run.ended())
    assert ends[0] == ends[1] and any(ahead)


def test_a_step_that_breaks_off_breaks_the_shard_and_the_rounds_before_it_count(
    runs: Callable[..., Run], ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(at_once=True)
    run.rounds(ROUNDS)
    assert any(ahead)

    def fail(self: StepsAhead, active: int, scalars: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(StepsAhead, "step", fail)
    while not isinstance(run.log[-1], str):
        run.rounds()
    assert "ShardLost" in run.log[-1] and "none left" in run.log[-1]
    descriptions = [shard.describe() for shard in run.shards.all]
    broken = [each.round for each in descriptions if each.phase == "broken"]
    assert broken and set(broken) == {run.round - 1}
