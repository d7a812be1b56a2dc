"""Powers, roots and cosines whose bits do not depend on the host.

The C library's `pow` and `cos` differ between hosts in the last bit, and every shard must compute
the same scalars. Here they go through `decimal`, whose operations are correctly rounded at a fixed
precision everywhere, and are rounded to float64 once. IEEE 754 has a square root rounded correctly.
"""

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import lru_cache

_CONTEXT = Context(prec=40, Emax=MAX_EMAX, Emin=MIN_EMIN)
_PI = Decimal("3.14159265358979323846264338327950288419716939937511")
_DIGITS = 64


def power(base: float, exponent: float) -> float:
    """Return ``base ** exponent`` for a base of at least 0, the same bits on every host."""
    if base == 0.0 or exponent == 0.0 or base == 1.0:
        return float(base**exponent)
    if exponent == 1.0:
        return base  # which the digits below round to
    return float(_CONTEXT.exp(_CONTEXT.multiply(Decimal(exponent), _ln(base))))


def square_root(value: float) -> float:
    """Return the root of a value of at least 0, the same bits on every host."""
    return math.sqrt(value)


@lru_cache(maxsize=1024)
def power_of_step(base: float, rate: float, step: int) -> float:
    """Return ``base ** (rate * step)``, the same bits on every host, for both at least 0.

    It is the product of one factor per digit of the step, and all but the last stay the same for a
    while, so that most steps cost one multiplication. The result depends on the arguments alone,
    not on earlier calls.
    """
    if base == 0.0 or rate == 0.0 or base == 1.0:
        return float(base ** (rate * step))
    higher, last = divmod(step, _DIGITS)
    return float(_CONTEXT.multiply(_factor(base, rate, last), _higher_factors(base, rate, higher)))


@lru_cache(maxsize=256)
def cosine_of_pi_times(fraction: float) -> float:
    """Return ``cos(pi * fraction)``, the same bits on every host, for a fraction in [0, 1].

    It sums the Taylor series.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"cosine_of_pi_times: fraction must be in [0, 1], got {fraction!r}")
    square = _CONTEXT.power(_CONTEXT.multiply(_PI, Decimal(fraction)), 2)
    term = total = Decimal(1)
    for n in range(1, 64):
        term = _CONTEXT.divide(_CONTEXT.multiply(term, square), Decimal(-2 * n * (2 * n - 1)))
        following = _CONTEXT.add(total, term)
        if following == total:
            break
        total = following
    return float(total)


@lru_cache(maxsize=64)
def _higher_factors(base: float, rate: float, digits: int) -> Decimal:
    """Return the product of the factors of all digits of a step but its last."""
    product, place = Decimal(1), _DIGITS
    while digits:
        digits, digit = divmod(digits, _DIGITS)
        if digit:
            product = _CONTEXT.multiply(product, _factor(base, rate, digit * place))
        place *= _DIGITS
    return product


@lru_cache(maxsize=1024)
def _factor(base: float, rate: float, step: int) -> Decimal:
    if rate == 1.0:  # a few squares, which cost less for a base that was never here before
        return _CONTEXT.power(Decimal(base), step)
    exponent = _CONTEXT.multiply(Decimal(rate), Decimal(step))
    return _CONTEXT.exp(_CONTEXT.multiply(exponent, _ln(base)))


@lru_cache(maxsize=64)
def _ln(base: float) -> Decimal:
    if base < 0.0:
        raise ValueError(f"power: base must be at least 0, got {base!r}")
    return _CONTEXT.ln(Decimal(base))
