"""How often a run retries ranks that fail, and which error ends it."""

import pytest

from distnadam.errors import TrainingError, WorkerLost
from distnadam.training.rank_runner import MAX_RECOVERIES, RetryBudget

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
