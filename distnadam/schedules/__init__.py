"""Learning-rate schedules: functions of the number of steps applied, 0 before the first.

Each is a frozen dataclass, so it compares, pickles, and goes to and from a plain dict; so does a
frozen dataclass of the user's that subclasses `Schedule`, whose fields may be schedules in turn.
Powers and cosines have the same bits on every host (`reproducible_math`).

    >>> from distnadam.schedules import Polynomial, Warmup, WarmupCosine
    >>> WarmupCosine(peak=0.1, warmup_steps=10, total_steps=100)(9)
    0.1

`Warmup` puts a linear rise before any of them, and `Sequential` one after the other:

    >>> Warmup(Polynomial(initial=0.1, total_steps=90), steps=10)(9)
    0.1
"""

from distnadam.schedules.base import Rate, Schedule, rate_at
from distnadam.schedules.composed import Sequential, Warmup
from distnadam.schedules.curves import (
    Constant,
    Exponential,
    InverseSquareRoot,
    Piecewise,
    Polynomial,
    WarmupCosine,
)
from distnadam.schedules.cycles import CosineRestarts, OneCycle
from distnadam.schedules.stored import kept, rate_from, rate_to_dict

__all__ = [
    "Constant",
    "CosineRestarts",
    "Exponential",
    "InverseSquareRoot",
    "OneCycle",
    "Piecewise",
    "Polynomial",
    "Rate",
    "Schedule",
    "Sequential",
    "Warmup",
    "WarmupCosine",
    "kept",
    "rate_at",
    "rate_from",
    "rate_to_dict",
]
