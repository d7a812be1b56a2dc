"""Schedules that rise and fall: one cycle, and cosines that begin again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distnadam.checks import check_flag
from distnadam.reproducible_math import cosine_of_pi_times
from distnadam.schedules.base import Schedule, require, set_count, set_real


@dataclass(frozen=True)
class OneCycle(Schedule):
    """A rise to `max_lr`, then a fall far below the first rate, as torch's OneCycleLR.

    It begins with ``max_lr / div_factor`` and ends with ``max_lr / div_factor / final_div_factor``,
    which step ``total_steps - 1`` has and later ones keep; torch raises after `total_steps` steps.
    Fields have torch's names and defaults. The momentum stays, as with ``cycle_momentum=False``.

    Args:
        max_lr: the largest rate.
        total_steps: steps of the cycle, at least 1.
        pct_start: the rise's part of the cycle, in [0, 1]; with `three_phase` at most 0.5.
        anneal_strategy: "cos" or "linear": how a rate goes over into the next.
        div_factor: `max_lr` divided by the first rate, above 0.
        final_div_factor: the first rate divided by the last one, above 0.
        three_phase: first fall back to the first rate, in as many steps as the rise has, and then
            to the last; else fall to the last at once.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = OneCycle(max_lr=1.0, total_steps=10, anneal_strategy="linear")
    >>> [round(schedule(step), 3) for step in (0, 1, 2, 8, 9, 10)]
    [0.04, 0.52, 1.0, 0.143, 0.0, 0.0]
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        set_real(self, "max_lr")
        set_count(self, "total_steps")
        set_real(self, "pct_start")
        three_phase = check_flag(f"{type(self).__name__}: three_phase", self.three_phase)
        expected = "in [0, 0.5] with three_phase" if three_phase else "in [0, 1]"
        most = 0.5 if three_phase else 1.0
        require(self.pct_start <= most, self, "pct_start", self.pct_start, expected)
        is_known = self.anneal_strategy in ("cos", "linear")
        require(is_known, self, "anneal_strategy", self.anneal_strategy, "'cos' or 'linear'")
        for field in ("div_factor", "final_div_factor"):
            set_real(self, field, is_positive=True)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        step = min(step, self.total_steps - 1)
        begin = 0.0
        for phase in self._phases():
            if step <= phase[0]:
                break
            begin = phase[0]
        end, first, last = phase
        # a phase of one step has its end only
        fraction = (step - begin) / (end - begin) if end > begin else 1.0
        if self.anneal_strategy == "linear":
            return first + (last - first) * fraction
        return last + (first - last) * 0.5 * (1.0 + cosine_of_pi_times(fraction))

    def _phases(self) -> Iterator[tuple[float, float, float]]:
        """Yield the last step of each phase, which may be a fraction, and its two rates."""
        first = self.max_lr / self.div_factor
        last = first / self.final_div_factor
        yield self.pct_start * self.total_steps - 1, first, self.max_lr
        fallen = self.max_lr
        if self.three_phase:
            yield 2 * self.pct_start * self.total_steps - 2, self.max_lr, first
            fallen = first
        yield self.total_steps - 1, fallen, last


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """Half a cosine from `peak` down to `final`, again and again, each longer than the one before.

    It is SGDR (Loshchilov and Hutter, 2017), and torch's CosineAnnealingWarmRestarts, whose T_0 is
    `period`, T_mult `growth` and eta_min `final`. No step has `final` itself, since the next period
    begins there.

    Args:
        peak: the rate of the first step of each period.
        period: steps of the first period, at least 1.
        growth: the length of each period in lengths of the one before, a whole number from 1 on.
        final: what the rate falls to.

    Raises:
        ConfigError: a field is out of its range.

    >>> schedule = CosineRestarts(peak=1.0, period=2, growth=2)
    >>> [round(schedule(step), 3) for step in range(7)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """

    peak: float
    period: int
    growth: int = 1
    final: float = 0.0

    def __post_init__(self) -> None:
        for field in ("peak", "final"):
            set_real(self, field)
        for field in ("period", "growth"):
            set_count(self, field)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        period = self.period
        if self.growth == 1:
            step %= period
        while step >= period:
            step -= period
            period *= self.growth
        cosine = cosine_of_pi_times(step / period)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + cosine)
