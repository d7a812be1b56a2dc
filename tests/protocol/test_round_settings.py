"""A push takes a short way only if it says nothing that the short ways do not know."""

from dataclasses import fields
from typing import Any

import pytest

from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.round_settings import ORDINARY, RoundSettings

RATES = packed_overrides(0.1, (0.9, 0.99), None)
SAID: dict[str, Any] = {
    "found_inf": True,
    "micro_steps": 2,
    "absent": frozenset({3}),
    "statement": "a change",
}
"""Of each field but `overrides`, something that an ordinary push does not say."""


def test_rates_alone_are_only_overrides() -> None:
    assert RoundSettings(overrides=RATES).only_overrides
    assert not ORDINARY.only_overrides


@pytest.mark.parametrize("name", sorted({f.name for f in fields(RoundSettings)} - {"overrides"}))
def test_rates_with_anything_else_are_not(name: str) -> None:
    assert not RoundSettings(overrides=RATES, **{name: SAID[name]}).only_overrides
