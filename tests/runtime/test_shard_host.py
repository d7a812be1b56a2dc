"""A host carries out its machine's effects, changes the machine under its lock only, and dispatches
every message.
"""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import distnadam.protocol.messages as msg
from distnadam.config import Options
from distnadam.errors import IllegalMessage, LifecycleError, WorkerLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.supervisor_events import RankJoined
from distnadam.protocol.supervisor_messages import AbandonRank, Load, Order
from distnadam.runtime import shard_host
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.effects import Notice
from distnadam.shard.phases import LEGAL
from distnadam.shard.progress import Progress
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"w": np.ones(3, np.float32)})
ONES = {"float32": np.ones(3, np.float32)}
WRITE = msg.Write(token="me", state={"params": ONES})


def new_host(num_workers: int = 1, **how: Any) -> ShardHost:
    spec = msg.ShardSpec(
        index=0,
        num_shards=1,
        num_workers=num_workers,
        replicas=0,
        name=None,
        config=NadamConfig(),
        options=Options(kernel="numpy"),
        layout=LAYOUT,
        ranges=LAYOUT.cuts(1)[0],
    )
    host = ShardHost(spec, **how)
    host.send(Load(epoch=1, params=ONES)).result(0)
    for rank in range(num_workers):
        host.send(msg.Join(rank=rank)).result(0)
    return host


def push(rank: int = 0, number: int = 1) -> msg.Push:
    return msg.Push(epoch=1, rank=rank, incarnation=1, round=number, gradients=ONES)


def paused_host() -> ShardHost:
    host = new_host()
    host.send(msg.Pause("me")).result(0)
    return host


def changed(host: ShardHost) -> str | None:
    """What the shard says was replaced since it was saved."""
    answer: str | None = host.send(msg.Describe()).result(0).changed
    return answer


def test_every_message_is_taken_by_the_host_or_by_the_machine() -> None:
    of_machine = set().union(*LEGAL.values())
    assert shard_host.TAKEN_HERE.keys() | of_machine == {
        *get_args(msg.Message),
        *get_args(Order),
        msg.Saved,
    }
    assert not shard_host.TAKEN_HERE.keys() & of_machine
    assert shard_host.PREPARED.keys() <= of_machine


def test_an_answer_reaches_its_own_caller_once() -> None:
    host = new_host(2)
    first, second = host.send(push(0)), host.send(push(1))
    assert (first.result(0).round, second.result(0).round) == (1, 1)


def test_a_notice_reaches_the_supervisor() -> None:
    notices: list[Notice] = []
    new_host(on_notice=notices.append)
    assert notices == [Notice(RankJoined(rank=0, incarnation=1))]


def test_nothing_leaves_before_it_may_but_the_status() -> None:
    may = [True]
    host = new_host(can_send=lambda: may[0])
    may[0] = False
    answer = host.send(push())
    assert host.send(msg.Describe()).result(0).round == 0
    assert not answer.done()
    may[0] = True
    host.resume()
    assert answer.result(0).round == 1


def test_closing_fails_who_waits_and_who_comes_later() -> None:
    host = new_host(2)
    waiting = host.send(push(0))
    host.close()
    for answer in (waiting, host.send(push(1))):
        with pytest.raises(LifecycleError, match="shard 0: the optimizer was closed"):
            answer.result(0)


def test_work_that_fails_breaks_the_shard_with_its_own_error() -> None:
    host = new_host()
    wrong_size = {"float32": np.ones(2, np.float32)}
    answer = host.send(msg.Push(epoch=1, rank=0, incarnation=1, round=1, gradients=wrong_size))
    with pytest.raises(ValueError, match="broadcast"):
        answer.result(0)
    assert host.send(msg.Describe()).result(0).phase == "broken"


def test_a_completed_push_gets_its_gradients_from_the_workers_memory() -> None:
    host = new_host()
    asked: list[tuple[Any, ...]] = []

    def gradients_of(*what: Any) -> dict[str, Any]:
        asked.append(what)
        return ONES

    host.gradients_of = gradients_of
    host.send(msg.Join(rank=0)).result(0)
    note = msg.PushNote(incarnation=1, round=1, dtypes={"float32": "float32"})
    host.send(msg.CompletePush(0, note)).result(0)
    assert asked == [(0, 1, {"float32": "float32"})]
    assert host.send(msg.Describe()).result(0).round == 1


def test_only_the_holder_saves(tmp_path: Path) -> None:
    host = paused_host()
    save = msg.Save(token="another", directory=str(tmp_path), file_name="file")
    with pytest.raises(IllegalMessage, match="legal only between Pause and Resume"):
        host.send(save).result(0)


@pytest.mark.parametrize("behind", [False, True])
def test_a_saved_state_is_no_longer_changed(behind: bool, tmp_path: Path) -> None:
    host = paused_host()
    host.send(WRITE).result(0)
    assert changed(host) == "the state was replaced after round 0"
    save = msg.Save(token="me", directory=str(tmp_path), file_name="file", behind=behind)
    record = host.send(save).result(0)
    if behind:
        record = host.send(msg.Collect("file")).result(10)
    assert record.name == "file"
    assert changed(host) is not None  # a checkpoint without a manifest is none
    host.send(msg.Committed("another")).result(0)
    assert changed(host) is not None
    host.send(msg.Committed("file")).result(0)
    assert changed(host) is None
    assert host.send(msg.Describe()).result(0).saved == str(tmp_path.parent)


@pytest.mark.parametrize("behind", [False, True])
def test_the_end_of_a_save_sends_nothing_of_others(behind: bool, tmp_path: Path) -> None:
    may = [True]
    host = new_host(can_send=lambda: may[0])
    host.send(msg.Pause("me")).result(0)
    may[0] = False
    joined = host.send(msg.Join(rank=0))
    may[0] = True
    save = msg.Save(token="me", directory=str(tmp_path), file_name="file", behind=behind)
    host.send(save).result(0)
    if behind:
        host.send(msg.Collect("file")).result(10)
    host.send(msg.Committed("file"))
    assert not joined.done()
    host.resume()
    assert joined.result(0).incarnation == 2


def test_a_write_that_comes_while_a_save_ends_is_not_taken_for_saved(tmp_path: Path) -> None:
    host = paused_host()
    host.send(WRITE).result(0)
    writes: list[tuple[threading.Thread, Future[Any]]] = []

    class Interrupted(Progress):
        """Has another write come just when the record of the first is to be cleared."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "changed" and value is None:
                written: Future[Any] = Future()
                thread = threading.Thread(target=host.deliver, args=(WRITE, written.set_result))
                thread.start()
                writes.append((thread, written))
                if not host.lock.locked():  # it may come at once
                    thread.join()
            super().__setattr__(name, value)

    host.shard.progress.__class__ = Interrupted
    save = msg.Save(token="me", directory=str(tmp_path), file_name="file")
    host.send(save).result(0)
    host.send(msg.Committed("file")).result(0)
    for thread, written in writes:
        thread.join()
        assert written.result(0) is None
    assert len(writes) == 1
    assert changed(host) is not None


def test_an_earlier_save_does_not_vouch_for_a_later_write(tmp_path: Path) -> None:
    host = paused_host()
    num_changes = host.shard.progress.num_changes
    host.send(WRITE).result(0)
    host.deliver(msg.Saved(num_changes), lambda _: None)
    assert changed(host) is not None
    host.deliver(msg.Saved(host.shard.progress.num_changes), lambda _: None)
    assert changed(host) is None


def test_those_who_wait_for_a_rank_given_up_get_worker_lost() -> None:
    host = new_host(2)
    answer = host.send(push(0))
    host.send(msg.WorkerDied(1, 1)).result(0)
    host.send(AbandonRank(1, 1)).result(0)
    with pytest.raises(WorkerLost, match="worker 1 died before it pushed for round 1"):
        answer.result(0)
