"""Compares the formulas that share the name "Nadam" with ours, and notes where they differ.

Every one is ``m += (g - m)(1 - beta_1); v += (g*g - v)(1 - beta_2)`` and a step along ``c_g*g +
c_m*m`` over ``sqrt(v_hat) + epsilon``; they differ in the momentum coefficient ``mu_t = beta_1 * (1
- 0.5 * 0.96 ** (t * schedule_decay))``:

    reference, tf_keras legacy      schedule_decay as given (0.004)
    torch.optim.NAdam               the same, called momentum_decay
    Keras 3, tf_keras's new Nadam   schedule_decay = 1, fixed
    optax.nadam                     mu_t = beta_1 at every step: the limit of a large schedule_decay
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distnadam.errors import ConversionError
from distnadam.hyperparameters import NadamConfig
from distnadam.interop.optimizer_state import OptimizerState
from distnadam.nadam.step_scalars import Clock
from distnadam.reproducible_math import power_of_step

NO_SCHEDULE = 1000.0
"""A schedule_decay with which mu_t is exactly beta_1 at every step: 0.96 ** 1000 < 2 ** -58."""
_ROUNDING = 2.0**-25
"""Half a unit in the last place of a float32 near 1; smaller differences are rounding."""


@dataclass
class Conversion:
    """A requested conversion, which collects its findings.

    Args:
        path: the other framework's file.
        order: the tensors' paths in the order in which the other framework lists its variables;
            None means the file's order, or the one given to `build`.
        config: hyper-parameters of an import, which add to or replace the file's.
        slots: whether an export writes the moments beside the parameters.
        lossy: whether to continue despite differences.
        differences: sentences about what would change how training goes on.
        notes: sentences about what the user has to set up outside the state.
    """

    path: Path
    order: Sequence[str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    slots: bool = True
    lossy: bool = False
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Raise ConversionError, naming the differences, unless they are allowed.

        Call this before anything is written.
        """
        if self.differences and not self.lossy:
            raise ConversionError(
                f"{self.path}: {'; '.join(self.differences)}. With lossy=True (--lossy) it "
                "converts all the same, and trains on differently"
            )

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The differences and notes, as sentences."""
        return (*(f"differs: {sentence}" for sentence in self.differences), *self.notes)


def momentum(config: NadamConfig, t: int, schedule_decay: float) -> float:
    """Return mu_t of a schedule_decay; `math.inf` means no schedule."""
    return config.beta_1 * (1.0 - 0.5 * _power(schedule_decay, t))


def same_momentum(state: OptimizerState, theirs: float) -> bool:
    """Return whether schedule_decay `theirs` gives our mu_t from the next step on, in float32."""
    ours, t = state.config.schedule_decay, state.clock.iterations + 1
    return ours == theirs or 0.5 * max(_power(ours, t), _power(theirs, t)) <= _ROUNDING


def unscheduled(config: NadamConfig, iterations: int) -> Clock:
    """Return the clock of an optimizer without a momentum schedule: its product is beta_1 ** t."""
    return Clock(iterations, power_of_step(config.beta_1, 1.0, iterations))


def find_momentum(job: Conversion, state: OptimizerState, theirs: float, what: str) -> None:
    """Add a difference if another framework's momentum schedule is not the state's.

    Args:
        job: receives the difference.
        state: ours.
        theirs: the other framework's schedule_decay.
        what: the other framework's schedule, as the end of the sentence "... here, and ".
    """
    if not same_momentum(state, theirs):
        t = state.clock.iterations + 1
        ours = state.config.schedule_decay
        job.differences.append(
            f"momentum schedule: schedule_decay is {ours:g} here, and {what}; the coefficient of "
            f"step {t} is {momentum(state.config, t, ours):.6g} here and "
            f"{momentum(state.config, t, theirs):.6g} there"
        )


def find_product(job: Conversion, state: OptimizerState, what: str) -> None:
    """Add a difference if the product of the coefficients so far is not beta_1 ** t.

    That is what the framework `what`, which stores no product, computes for itself.
    """
    theirs = unscheduled(state.config, state.clock.iterations).m_schedule
    if abs(state.clock.m_schedule - theirs) > _ROUNDING:
        job.differences.append(
            f"product of the momentum coefficients: {state.clock.m_schedule:.6g} here after "
            f"{state.clock.iterations} steps, and {what} takes beta_1 ** step, {theirs:.6g}"
        )


def find_outside(
    job: Conversion, state: OptimizerState, what: str, *, clips: tuple[str, ...] = ()
) -> None:
    """Add notes on what the framework `what` keeps outside its optimizer's state.

    That is a learning-rate schedule, clipping other than `clips`, and float32 master copies of
    tensors in half precision.
    """
    if callable(state.config.lr):
        job.notes.append(
            f"learning rate: {state.config.lr!r} does not carry over; {what} gets its rate of the "
            f"next step, {state.rate:g}"
        )
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        value = getattr(state.config, name)
        if value is not None and name not in clips:
            job.notes.append(
                f"{name}: {value:g} does not carry over; clip the gradients yourself before each "
                f"step of {what}"
            )
    if state.half:
        few = ", ".join(map(repr, state.half[:3])) + (" and others" if len(state.half) > 3 else "")
        job.notes.append(
            f"half precision: {few}: given as float32 masters with float32 moments; {what} keeps "
            "moments in the parameter's dtype, so train the masters"
        )


def find_count(job: Conversion, state: OptimizerState, largest: int, what: str) -> None:
    """Add a difference if the framework's step counter cannot count on from ours."""
    if state.clock.iterations >= largest:
        job.differences.append(
            f"step: {state.clock.iterations} here, and {what} counts to {largest} at most"
        )


def _power(schedule_decay: float, t: int) -> float:
    return 0.0 if math.isinf(schedule_decay) else power_of_step(0.96, schedule_decay, t)
