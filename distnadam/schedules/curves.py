"""Schedules that are one formula of the step."""

from dataclasses import dataclass

from distnadam.reproducible_math import cosine_of_pi_times, power, square_root
from distnadam.schedules.base import Schedule, require, set_count, set_real


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at every step.

    Args:
        rate: the learning rate.

    >>> Constant(0.1)(1000)
    0.1
    """

    rate: float

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step."""
        return self.rate


@dataclass(frozen=True)
class Exponential(Schedule):
    """``initial * decay_rate ** (step / decay_steps)``, as Keras's ExponentialDecay.

    Args:
        initial: the rate of the first step.
        decay_steps: steps in which the rate is multiplied by `decay_rate`.
        decay_rate: the factor.
        staircase: round the exponent down.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = Exponential(initial=1.0, decay_steps=10, decay_rate=0.5)
    >>> schedule(0), schedule(10), schedule(20)
    (1.0, 0.5, 0.25)
    """

    initial: float
    decay_steps: int
    decay_rate: float
    staircase: bool = False

    def __post_init__(self) -> None:
        require(self.decay_steps >= 1, self, "decay_steps", self.decay_steps, "at least 1")
        require(self.decay_rate >= 0, self, "decay_rate", self.decay_rate, "at least 0")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        exponent = step // self.decay_steps if self.staircase else step / self.decay_steps
        return self.initial * power(float(self.decay_rate), float(exponent))


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A linear rise to `peak`, then half a cosine down to `final`, which stays.

    Args:
        peak: the largest rate.
        warmup_steps: steps of the rise.
        total_steps: the step at which `final` is reached.
        final: the last rate.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = WarmupCosine(peak=1.0, warmup_steps=2, total_steps=10)
    >>> [schedule(step) for step in (0, 1, 2, 6, 10, 99)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """

    peak: float
    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, self, "warmup_steps", self.warmup_steps, "at least 0")
        require(
            self.total_steps > self.warmup_steps,
            self,
            "total_steps",
            self.total_steps,
            "more than warmup_steps",
        )

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        fraction = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + cosine_of_pi_times(fraction))


@dataclass(frozen=True)
class Piecewise(Schedule):
    """`rates[i]` up to and including step `boundaries[i]`, as Keras's PiecewiseConstantDecay.

    Args:
        boundaries: increasing steps.
        rates: one more than there are boundaries; the last one stays.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = Piecewise(boundaries=(2, 4), rates=(0.1, 0.01, 0.001))
    >>> [schedule(step) for step in (0, 2, 3, 4, 5)]
    [0.1, 0.1, 0.01, 0.01, 0.001]
    """

    boundaries: tuple[int, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "rates", tuple(self.rates))
        require(
            len(self.rates) == len(self.boundaries) + 1,
            self,
            "rates",
            self.rates,
            "one longer than boundaries",
        )
        require(
            list(self.boundaries) == sorted(set(self.boundaries)),
            self,
            "boundaries",
            self.boundaries,
            "increasing",
        )

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        passed = sum(step > boundary for boundary in self.boundaries)
        return self.rates[passed]


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``final + (initial - final) * (1 - step / total_steps) ** power``, then `final`, which stays.

    It is optax's polynomial_schedule, and with ``final=0`` torch's PolynomialLR. With ``power=1``
    it is a straight line.

    Args:
        initial: the rate of the first step.
        total_steps: the step at which `final` is reached, at least 1.
        power: the exponent, above 0.
        final: the last rate; it may be above `initial`.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = Polynomial(initial=1.0, total_steps=4, power=2.0)
    >>> [schedule(step) for step in range(6)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """

    initial: float
    total_steps: int
    power: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        for field in ("initial", "final"):
            set_real(self, field)
        set_count(self, "total_steps")
        set_real(self, "power", is_positive=True)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        if step >= self.total_steps:
            return self.final
        left = power(1.0 - step / self.total_steps, self.power)
        return self.final + (self.initial - self.final) * left


@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """``peak * sqrt(timescale / (timescale + step))``, which follows a warm-up of the Transformer.

    The rate falls as in section 5.3 of "Attention Is All You Need" (Vaswani et al., 2017), after a
    warm-up of `timescale` steps. ``Warmup(InverseSquareRoot(peak, n), steps=n, initial=0.0)`` is
    fairseq's inverse_sqrt and the get_inverse_sqrt_schedule of Hugging Face's transformers. The
    paper counts steps from 1, so the peak comes one step earlier there:
    ``Warmup(InverseSquareRoot(peak, n), steps=n - 1, initial=peak / n)``.

    Args:
        peak: the rate of the first step; in the paper ``(d_model * timescale) ** -0.5``.
        timescale: steps, above 0; after 3 times as many the rate is half of `peak`.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = InverseSquareRoot(peak=1.0, timescale=100)
    >>> schedule(0), schedule(300), schedule(1500)
    (1.0, 0.5, 0.25)
    """

    peak: float
    timescale: float

    def __post_init__(self) -> None:
        set_real(self, "peak")
        set_real(self, "timescale", is_positive=True)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        return self.peak * square_root(self.timescale / (self.timescale + step))
