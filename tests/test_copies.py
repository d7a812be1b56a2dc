"""Copies of objects, as another process would get them: what is shared, what cannot be copied."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam.copies import copied
from distnadam.errors import ConfigError

TOTAL = 3


def double(number: int) -> int:
    return 2 * number


class Thing:
    """Holds whatever it is given."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def add(self, number: int) -> list[int]:
        self.seen: list[int]
        self.seen.append(number)
        return self.seen


def counter(total: list[int]) -> Any:
    def count(step: int = TOTAL) -> int:
        total[0] += step
        return total[0]

    return count


def countdown() -> Any:
    def down(number: int) -> int:
        return 0 if number == 0 else 1 + down(number - 1)

    return down


def test_what_one_copy_changes_the_others_do_not_see() -> None:
    array, seen = np.zeros(3), [1]
    task = Thing(array=array, alias=array[1:], seen=seen, same=seen, deep={"a": ({"b": [array]},)})
    copy = copied(task, "the task")
    copy.add(2)
    copy.array[:] = 7
    assert (task.seen, task.array.tolist()) == ([1], [0, 0, 0])
    assert copy.same is copy.seen, "what was one object is one"
    assert copy.deep["a"][0]["b"][0] is copy.array
    assert type(copy) is Thing


@pytest.mark.parametrize(
    "make",
    [
        lambda total: counter(total),
        lambda total: lambda: total.__setitem__(0, total[0] + TOTAL) or total[0],
        lambda total: functools.partial(counter(total), 3),
        lambda total: Thing(seen=total).add,
    ],
    ids=["inner function", "lambda", "partial", "method"],
)
def test_a_function_is_copied_with_what_it_refers_to(make: Any) -> None:
    total = [0]
    function = make(total)
    copy = copied(function, "the task")
    args = (1,) if hasattr(function, "__self__") else ()
    assert copy(*args) == copied(function, "the task")(*args)
    assert total == [0]


def test_a_function_that_calls_itself_is_copied() -> None:
    down = countdown()
    copy = copied(down, "the task")
    assert copy(4) == 4
    assert copy.__closure__[0].cell_contents is copy


def test_modules_classes_and_functions_are_the_process_s_own() -> None:
    held = [np, Thing, double, len, np.add, Path]
    assert all(a is b for a, b in zip(held, copied(held, "the task"), strict=True))


def test_arrays_that_cannot_be_written_are_shared(tmp_path: Path) -> None:
    constant = np.arange(3)
    constant.flags.writeable = False
    under_a_name_that_writes = np.zeros(3)
    view = under_a_name_that_writes[:]
    view.flags.writeable = False
    np.arange(8).tofile(tmp_path / "data")
    on_disk = np.memmap(tmp_path / "data", np.int64, "r")
    copy = copied(Thing(constant=constant, view=view, on_disk=on_disk), "the task")
    assert np.shares_memory(copy.constant, constant)
    assert np.shares_memory(copy.on_disk, on_disk)
    assert not np.shares_memory(copy.view, view)


class Refusing:
    def __getstate__(self) -> Any:
        raise RuntimeError("not me")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (threading.Lock, "cannot pickle '_thread.lock' object"),
        (lambda: (number for number in range(3)), "cannot pickle 'generator' object"),
        (Refusing, "RuntimeError: not me"),
    ],
    ids=["lock", "generator", "refusing"],
)
def test_what_cannot_be_copied_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(
        ConfigError, match=r"the task: cannot be copied.*where it is first used"
    ) as e:
        copied(Thing(deep=[make()]), "the task")
    assert reason in str(e.value)
