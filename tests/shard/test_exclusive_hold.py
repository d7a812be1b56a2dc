"""One caller at a time holds a shard, in the order in which they asked; rounds pass to a limit."""

import math

import pytest

from distnadam.errors import IllegalMessage
from distnadam.shard.exclusive_hold import ExclusiveHold


def held_by_first() -> ExclusiveHold:
    """A hold that the first of two askers has, after round 3."""
    hold = ExclusiveHold()
    hold.ask("caller 1", "first")
    hold.ask("caller 2", "second")
    assert hold.admit(3) == ["caller 1"]
    return hold


def test_rounds_pass_freely_until_somebody_holds_the_shard() -> None:
    assert ExclusiveHold().limit == math.inf
    hold = held_by_first()
    assert hold.limit == 3


def test_holders_take_turns_in_the_order_in_which_they_asked() -> None:
    hold = held_by_first()
    assert hold.admit(3) == []
    assert hold.release("first") == []
    assert hold.admit(5) == ["caller 2"]
    assert hold.holder == "second" and hold.limit == 5


def test_a_holder_that_asks_again_is_answered_again() -> None:
    hold = held_by_first()
    hold.ask("caller 1 again", "first")
    assert hold.admit(3) == ["caller 1 again"]
    assert hold.admit(3) == []


def test_only_the_holder_passes_the_check() -> None:
    hold = held_by_first()
    hold.require("first", 0)
    for token in ("second", ""):
        with pytest.raises(IllegalMessage, match="shard 0: this is legal only between Pause and"):
            hold.require(token, 0)


def test_a_catch_up_opens_the_rounds_up_to_its_own_and_is_answered_then() -> None:
    hold = held_by_first()
    hold.advance("caller 1", 5)
    assert hold.limit == 5
    assert hold.arrived(4) == []
    assert hold.arrived(5) == ["caller 1"]
    assert hold.arrived(6) == []


def test_one_that_gives_up_waiting_leaves_the_queue_and_not_the_hold() -> None:
    hold = held_by_first()
    assert hold.release("second") == ["caller 2"]
    assert hold.holder == "first" and hold.limit == 3
    hold.release("first")
    assert hold.admit(3) == [] and hold.limit == math.inf


def test_a_reset_opens_it_and_returns_everyone_that_waits() -> None:
    hold = held_by_first()
    hold.advance("caller 1", 5)
    assert hold.reset() == ["caller 2", "caller 1"]
    assert hold.holder is None and hold.limit == math.inf and hold.drain() == []
