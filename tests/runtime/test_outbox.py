"""An outbox sends effects in their order, by one thread at a time, and begins work after them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from distnadam.protocol.delivery import RunWork, run_in_this_thread
from distnadam.protocol.supervisor_messages import DetachStandby
from distnadam.runtime.outbox import Outbox
from distnadam.shard.effects import Answer, Compute, Effect, Replicate, Work

RECORD = Replicate(DetachStandby())


class Sent:
    """An outbox and all that left it, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.may_send = True
        self.must_send = False
        self.on_answer: Callable[[Answer], None] = lambda answer: None
        self.box = Outbox(
            {Answer: self._answer, Replicate: self.log.append},
            self._compute,
            run_work=_run_elsewhere,
            can_send=lambda: self.may_send,
        )

    def put(self, *effects: Effect, run_work: RunWork = run_in_this_thread) -> None:
        self.must_send |= self.box.put(run_work, lambda: list(effects))

    def send(self) -> None:
        """Send what may leave, as who has put it, or as somebody else."""
        must_send, self.must_send = self.must_send, False
        if must_send:
            self.box.send()
        else:
            self.box.flush()

    def _answer(self, answer: Answer) -> None:
        self.log.append(answer)
        self.on_answer(answer)

    def _compute(self, work: Work, run_work: RunWork) -> None:
        self.log.append((work, run_work))


def _run_elsewhere(work: Callable[[], None]) -> None:
    """The runner of work that another thread queued."""
    work()


def test_effects_leave_in_the_order_in_which_they_arose_and_work_begins_last() -> None:
    sent = Sent()
    sent.put(RECORD, Compute(Work.STEP), Answer("a", 1))
    sent.put(Answer("b", 2))
    sent.send()
    assert sent.log == [RECORD, Answer("a", 1), Answer("b", 2), (Work.STEP, run_in_this_thread)]


def test_the_machine_changes_under_the_lock_and_effects_are_sent_outside_it() -> None:
    sent = Sent()
    held: list[bool] = []

    def change() -> list[Effect]:
        held.append(sent.box.lock.locked())
        return [Answer("a", None)]

    sent.on_answer = lambda answer: held.append(sent.box.lock.locked())
    sent.must_send = sent.box.put(run_in_this_thread, change)
    sent.send()
    assert held == [True, False]


def test_an_effect_that_nobody_carries_is_dropped() -> None:
    sent = Sent()
    del sent.box.carriers[Replicate]
    sent.put(RECORD, Answer("a", 1))
    sent.send()
    assert sent.log == [Answer("a", 1)]
    sent.box.carriers[Replicate] = sent.log.append
    sent.put(RECORD)
    sent.send()
    assert sent.log == [Answer("a", 1), RECORD]


def test_a_refused_change_queues_nothing() -> None:
    sent = Sent()

    def refuse() -> list[Effect]:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        sent.box.put(run_in_this_thread, refuse)
    sent.send()
    assert sent.log == [] and not sent.box.lock.locked()


def test_what_may_not_leave_waits_for_the_next_flush() -> None:
    sent = Sent()
    sent.may_send = False
    sent.put(Answer("a", 1))
    sent.send()
    assert sent.log == []
    sent.may_send = True
    sent.put(Answer("b", 2))
    sent.send()
    assert sent.log == [Answer("a", 1), Answer("b", 2)]


def test_effects_that_sending_causes_leave_after_those_before_them() -> None:
    sent = Sent()

    def more(answer: Answer) -> None:
        if answer.caller == "a":
            sent.put(Answer("c", 3))
            sent.send()

    sent.on_answer = more
    sent.put(Answer("a", 1), Answer("b", 2))
    sent.send()
    assert [answer.caller for answer in sent.log] == ["a", "b", "c"]


def test_work_that_another_thread_queued_is_not_run_by_the_sender() -> None:
    sent = Sent()
    other = threading.Thread(target=lambda: sent.put(Compute(Work.STEP)))
    other.start()
    other.join()
    sent.send()
    assert sent.log == [(Work.STEP, _run_elsewhere)]


def test_an_effect_that_fails_does_not_stop_those_after_it_for_ever() -> None:
    sent = Sent()

    def fail(answer: Answer) -> None:
        if answer.caller == "a":
            raise KeyboardInterrupt

    sent.on_answer = fail
    sent.put(Answer("a", 1), Answer("b", 2))
    with pytest.raises(KeyboardInterrupt):
        sent.send()
    sent.send()
    assert [answer.caller for answer in sent.log] == ["a", "b"]
