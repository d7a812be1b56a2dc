"""How often a run retries ranks that fail, which error ends it, and what is known of its steps."""

import signal
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from distnadam import DistNadam
from distnadam.backends.local_worker_group import LocalWorkerGroup
from distnadam.errors import TrainingError, WorkerLost
from distnadam.training.rank_loop import RankLoop
from distnadam.training.rank_runner import (
    MAX_RECOVERIES,
    RankRunner,
    RetryBudget,
    restart_sentence,
)
from distnadam.training.steps import StepRecord
from tests.training.test_fit import Quadratic
from tests.training.test_task_state import Averaging, of_rank_0

DIED = WorkerLost("worker 1: its process died")


def test_a_rank_may_fail_as_often_as_the_run_makes_steps() -> None:
    budget = RetryBudget()
    for step in range(3 * MAX_RECOVERIES):
        budget.count(step, DIED, rank=1)
    assert budget.total == 3 * MAX_RECOVERIES


def test_a_rank_that_fails_without_a_new_step_ends_the_run() -> None:
    budget = RetryBudget()
    for _ in range(MAX_RECOVERIES):
        budget.count(7, DIED, rank=1)
    with pytest.raises(
        TrainingError,
        match="3 recoveries in a row after step 7 brought no new step; the last: WorkerLost",
    ) as raised:
        budget.count(7, DIED, rank=1)
    assert raised.value.__cause__ is DIED


def test_going_back_to_an_earlier_step_is_no_progress() -> None:
    budget = RetryBudget()
    for step in (7, 5, 6):
        budget.count(step, DIED, rank=1)
    with pytest.raises(TrainingError, match="after step 7"):
        budget.count(7, DIED, rank=1)


def test_each_rank_and_the_whole_run_have_a_budget_of_their_own() -> None:
    budget = RetryBudget()
    for rank in (0, 1, None):
        for _ in range(MAX_RECOVERIES):
            budget.count(7, DIED, rank=rank)
    for rank in (0, 1, None):
        with pytest.raises(TrainingError):
            budget.count(7, DIED, rank=rank)


def test_an_error_of_the_task_itself_is_raised_unchanged() -> None:
    budget, error = RetryBudget(), TrainingError("worker 1, step 7: the task raised ...")
    for _ in range(MAX_RECOVERIES):
        budget.count(7, error, rank=1)
    with pytest.raises(TrainingError) as raised:
        budget.count(7, error, rank=1)
    assert raised.value is error


class Mortal(LocalWorkerGroup):
    """Ranks that are lost with their first report of some steps, once each."""

    doomed: set[int]

    @override
    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        found = super().results(timeout_s)
        lost = {rank for rank, result in found if rank in self.doomed and result}
        self.doomed -= lost
        return [(rank, DIED if rank in lost else result) for rank, result in found]


class Interrupted(LocalWorkerGroup):
    """Sends a Ctrl-C in the next look for results, once they are there or before; one result comes
    at a time.
    """

    interrupts: bool = False
    before: bool
    others: tuple[tuple[int, Any], ...] = ()

    @override
    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        interrupts, self.interrupts = self.interrupts, False
        found = [] if interrupts and self.before else [*self.others, *super().results(0.05)]
        self.others = tuple(found[1:])
        if interrupts:
            signal.raise_signal(signal.SIGINT)
        return found[:1]


@pytest.mark.parametrize("before", [True, False], ids=["before it comes", "as it comes"])
def test_a_ctrl_c_while_rank_0_is_asked_for_its_state_leaves_no_answer_behind(before: bool) -> None:
    task = Averaging()
    with DistNadam(num_workers=2, backend="local").build(task.init(0)) as optimizer:
        group = Interrupted(
            2,
            lambda rank, task: RankLoop(task, optimizer.worker(rank), 2, 0),
            (task,),
            threads=1,
        )
        group.before = before
        ranks = RankRunner(
            group, 2, optimizer=optimizer, retries=RetryBudget(), on_recovery=lambda *_: None
        )
        for end in (2, 4):
            ranks.begin(end)
            assert {step: set(each) for step, each in ranks.finish().items()} == {
                end - 2: {0, 1},
                end - 1: {0, 1},
            }
            group.interrupts = True
            with pytest.raises(KeyboardInterrupt):
                ranks.state()
            state = ranks.state()
            assert np.array_equal(state["average"], of_rank_0(end))
    group.close()


@pytest.mark.parametrize("doomed", [{1}, {0}, {0, 1}])
def test_a_step_that_a_rank_died_with_is_known_by_the_others(doomed: set[int]) -> None:
    task, messages = Quadratic(), list[str]()
    with DistNadam(num_workers=2, backend="local").build(task.init(0)) as optimizer:
        group = Mortal(
            2,
            lambda rank, task: RankLoop(task, optimizer.worker(rank), 2, 0),
            (task,),
            threads=1,
        )
        group.doomed = set(doomed)
        ranks = RankRunner(
            group,
            2,
            optimizer=optimizer,
            retries=RetryBudget(),
            on_recovery=lambda _, text: messages.append(text),
        )
        seen = []
        for end in (3, 5):
            ranks.begin(end)
            seen.append(ranks.finish())
        assert optimizer.iterations == 5
    group.close()
    first = [StepRecord.of(step + 1, seen[0].get(step, {})).ranks for step in range(3)]
    assert first == [tuple({0, 1} - doomed)] * 3
    assert {step: set(each) for step, each in seen[1].items()} == {3: {0, 1}, 4: {0, 1}}
    assert len(messages) == len(doomed)


def test_the_sentence_of_a_restart_says_who_at_which_step_what_and_what_now() -> None:
    assert restart_sentence(1, 7, DIED) == "worker 1, step 7: its process died; it is started again"
