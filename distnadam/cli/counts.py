"""Counts on the command line, which may be written as 1e9."""

import math
from contextlib import suppress
from typing import Any

import click


class _Count(click.ParamType[int]):
    """A whole number of at least 1, which may be written 1e9."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the number."""
        number = math.nan
        with suppress(TypeError, ValueError):
            number = float(value)
        if not math.isfinite(number) or number < 1 or number != int(number):
            expected = "expected a whole number of at least 1, such as 1e9"
            self.fail(f"{expected}, got {value!r}", param, ctx)
        return int(number)


COUNT = _Count()
