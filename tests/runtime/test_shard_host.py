"""A host carries out its machine's effects, changes the machine under its lock only, and dispatches
every message.
"""

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


def test_every_message_is_taken_by_the_host_or_by_the_machine() -> None:
    of_machine = set().union(*LEGAL.values())
    assert shard_host.TAKEN_HERE.keys() | of_machine == {
        *get_args(msg.Message),
        *get_args(Order),
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


def test_those_who_wait_for_a_rank_given_up_get_worker_lost() -> None:
    host = new_host(2)
    answer = host.send(push(0))
    host.send(msg.WorkerDied(1, 1)).result(0)
    host.send(AbandonRank(1, 1)).result(0)
    with pytest.raises(WorkerLost, match="worker 1 died before it pushed for round 1"):
        answer.result(0)
