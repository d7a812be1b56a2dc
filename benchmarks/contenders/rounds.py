"""What every contender over hosts says: "warm", and at a line of input the median step."""

import statistics
import sys
from collections.abc import Callable
from typing import Any

from tests.hosts.program import say


def report(run: Callable[[int], list[float]], about: dict[str, Any]) -> None:
    """Warm up, and say so; measure at a line of input, and end at another.

    Args:
        run: makes so many steps, and returns the seconds of each.
        about: how many steps; see `benchmarks/hosts.py`.
    """
    run(about["warm_up"])
    say(warm=True)
    sys.stdin.readline()
    say(median_s=statistics.median(run(about["steps"])))
    sys.stdin.readline()
