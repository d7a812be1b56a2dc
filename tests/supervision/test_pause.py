"""Pausing all shards: shard 0 first, late ones catch up, and all resume whatever happens."""

from collections.abc import Mapping
from typing import Any

import pytest

from distnadam.errors import StepTimeout
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import CatchUp, Pause, Paused, Resume
from distnadam.supervision.pause import all_paused, lagging


class Shards:
    """Shards at given rounds, which record what they are sent."""

    def __init__(self, *rounds: int, silent: int | None = None) -> None:
        self.rounds = rounds
        self.silent = silent
        self.log: list[tuple[str, tuple[int, ...]]] = []

    def ask(self, messages: Mapping[int, Any]) -> dict[int, Any]:
        self.log.append((type(next(iter(messages.values()))).__name__, tuple(messages)))
        if self.silent in messages:
            raise StepTimeout(f"shard {self.silent} is silent")
        return {
            index: self._paused(index) if isinstance(message, Pause) else None
            for index, message in messages.items()
        }

    def _paused(self, index: int) -> Paused:
        return Paused(
            epoch=1,
            round=self.rounds[index],
            clock=Clock(),
            skipped=0,
            config=NadamConfig(),
            revision=0,
            pending=(),
        )

    def resume(self, messages: Mapping[int, Resume]) -> None:
        self.log.append(("Resume", tuple(messages)))


def test_shard_0_is_paused_first_and_those_behind_catch_up() -> None:
    shards = Shards(5, 6, 5)
    with all_paused(shards.ask, shards.resume, "me", 3) as held:
        assert {index: answer.round for index, answer in held.items()} == {0: 5, 1: 6, 2: 5}
        assert lagging(held) == [0, 2]
    assert shards.log == [
        ("Pause", (0,)),
        ("Pause", (1, 2)),
        ("CatchUp", (0, 2)),
        ("Resume", (0, 1, 2)),
    ]


def test_late_shards_stay_where_they_are_if_they_may() -> None:
    shards = Shards(5, 6)
    with all_paused(shards.ask, shards.resume, "me", 2, may_lag=lambda at: at.round == 6):
        pass
    assert CatchUp.__name__ not in [kind for kind, _ in shards.log]


@pytest.mark.parametrize("silent", [0, 1])
def test_shards_resume_where_one_cannot_be_paused(silent: int) -> None:
    shards = Shards(5, 5, silent=silent)
    with (
        pytest.raises(StepTimeout, match=f"shard {silent} is silent"),
        all_paused(shards.ask, shards.resume, "me", 2),
    ):
        raise AssertionError("not all shards are paused")
    assert shards.log[-1] == ("Resume", (0, 1))


def test_shards_resume_where_the_work_fails() -> None:
    shards = Shards(5)
    with pytest.raises(ZeroDivisionError), all_paused(shards.ask, shards.resume, "me", 1):
        raise ZeroDivisionError
    assert shards.log == [("Pause", (0,)), ("Resume", (0,))]
