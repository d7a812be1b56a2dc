"""Compares our formulas with those of the frameworks, and notes where they differ.

Every one is ``m += (g - m)(1 - beta_1); v += (g*g - v)(1 - beta_2)`` and a step along ``c_g*g +
c_m*m`` over ``sqrt(v_hat) + epsilon``. `NadamConfig.formula` says which:

    "nadam"           mu_t = beta_1 * (1 - 0.5 * 0.96 ** (t * schedule_decay)), with a running
                      product of the mu_t. The reference and tf_keras legacy have schedule_decay as
                      given (0.004), torch.optim.NAdam calls it momentum_decay, and Keras 3 and
                      tf_keras's new Nadam have 1, fixed.
    "nadam_optax"     mu_t = beta_1 at every step: optax.nadam and nadamw. It is "nadam" in the
                      limit of a large schedule_decay (`NO_SCHEDULE`).
    "nadam_algoperf"  the same, but m is divided by 1 - beta_1 ** t, not t + 1: the NadamW of
                      MLCommons' AlgoPerf. No framework here has it.
    "adam"            c_m*m alone, mu_t = beta_1: torch.optim.Adam and AdamW, optax.adam and adamw.
    "adam_keras"      the same over ``sqrt(v) + epsilon``, with the correction of v in c_m: Adam and
                      AdamW of Keras, where epsilon weighs more in the first steps.

Decoupled weight decay is ``p *= 1 - lr * weight_decay`` before the step in all that have it;
coupled is ``g += weight_decay * p`` before the moments.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distnadam.errors import ConversionError
from distnadam.groups import Group
from distnadam.hyperparameters import Formula, NadamConfig
from distnadam.interop.optimizer_state import OptimizerState
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.reproducible_math import power_of_step
from distnadam.schedules import rate_at

NO_SCHEDULE = 1000.0
"""A schedule_decay with which mu_t is exactly beta_1 at every step: 0.96 ** 1000 < 2 ** -58. By it
torch and the reference compute "nadam_optax".
"""
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


def is_adam(config: NadamConfig) -> bool:
    """Return whether the formula is one of Adam's, which has no term of the gradient itself."""
    return config.formula in ("adam", "adam_keras")


def schedule_decay(config: NadamConfig) -> float:
    """Return the schedule_decay; `math.inf` means that the momentum is constant."""
    return config.schedule_decay if config.has_momentum_schedule else math.inf


def momentum(config: NadamConfig, t: int, decay: float) -> float:
    """Return mu_t of the schedule_decay `decay`."""
    return config.beta_1 * (1.0 - 0.5 * _power(decay, t))


def same_momentum(state: OptimizerState, theirs: float) -> bool:
    """Return whether schedule_decay `theirs` gives our mu_t from the next step on, in float32."""
    ours, t = schedule_decay(state.config), state.fewest_steps + 1
    return ours == theirs or 0.5 * max(_power(ours, t), _power(theirs, t)) <= _ROUNDING


def unscheduled(config: NadamConfig, iterations: int) -> Clock:
    """Return the clock of an optimizer without a momentum schedule: its product is beta_1 ** t."""
    return Clock(iterations, power_of_step(config.beta_1, 1.0, iterations))


def with_own_product(state: OptimizerState) -> OptimizerState:
    """Return the state with the product that its formula has: beta_1 ** t without a schedule."""
    if state.config.has_momentum_schedule:
        return state
    clock = unscheduled(state.config, state.clock.iterations)
    if (tensors := state.clock.tensors) is not None:
        own = zip(map(tensors.table.__getitem__, tensors.index), state.settings, strict=True)
        products = [
            TensorClock(at.steps, unscheduled(settings, at.steps).m_schedule)
            for at, (_, settings) in own
        ]
        clock = replace(clock, tensors=TensorClocks.of(products))
    return replace(state, clock=clock)


def find_formula(
    job: Conversion, state: OptimizerState, theirs: Formula, what: str, *, decay: float = math.inf
) -> None:
    """Add a difference for each way in which the formula of `what` goes on differently.

    Ways that no longer matter in float32, since the state's steps are many, are none.

    Args:
        job: receives the differences.
        state: ours.
        theirs: the formula of `what`, Nadam's or Adam's as the state's is.
        what: the other framework.
        decay: its schedule_decay, where `theirs` is "nadam" or means that limit.
    """
    if is_adam(state.config):
        _find_epsilon(job, state, theirs, what)
        return
    _find_momentum(job, state, decay, what)
    t = state.fewest_steps + 1
    product = unscheduled(state.config, t).m_schedule
    if state.config.formula == "nadam_algoperf" != theirs and product > _ROUNDING:
        job.differences.append(
            f"look-ahead: formula='nadam_algoperf' divides the momentum by 1 - beta_1 ** step, and "
            f"{what} by 1 - beta_1 ** (step + 1); beta_1 ** {t} is "
            f"{product:.6g}"
        )


def find_product(job: Conversion, state: OptimizerState, what: str) -> None:
    """Add a difference if the product of the coefficients so far is not beta_1 ** t.

    That is what the framework `what`, which stores no product, computes for itself.
    """
    theirs = unscheduled(state.config, state.clock.iterations).m_schedule
    if state.config.has_momentum_schedule and abs(state.clock.m_schedule - theirs) > _ROUNDING:
        job.differences.append(
            f"product of the momentum coefficients: {state.clock.m_schedule:.6g} here after "
            f"{state.clock.iterations} steps, and {what} takes beta_1 ** step, {theirs:.6g}"
        )


def find_absent(
    job: Conversion,
    state: OptimizerState,
    what: str,
    *,
    decoupled: str | None,
    coupled: str,
    maximize: str,
) -> None:
    """Add a difference for weight decay and `maximize` where set, and `what` has no argument.

    Args:
        job: receives the differences.
        state: ours.
        what: the other framework's optimizer.
        decoupled: the remedy for decoupled weight decay; None: it has an argument for that.
        coupled: the remedy for coupled weight decay.
        maximize: the remedy for `maximize`.
    """
    decay, is_decoupled = state.weight_decay, state.config.decoupled_weight_decay
    remedy = decoupled if is_decoupled else coupled
    if decay and remedy is not None:
        job.differences.append(
            f"weight_decay: {decay:g} here, {'decoupled' if is_decoupled else 'coupled (L2)'}, and "
            f"{what} has no argument for it: {remedy}"
        )
    if state.config.maximize:
        job.differences.append(
            f"maximize: True here, and {what} has no argument for it: {maximize}"
        )


def find_average(job: Conversion, state: OptimizerState, what: str) -> None:
    """Add a note on the average of the parameters, which the framework `what` does not keep, and a
    difference if the parameters become it now and then.
    """
    config = state.config
    if not config.use_ema:
        return
    job.notes.append(
        f"use_ema: the average of the parameters does not carry over, {what} keeps none; "
        "get_ema_params() of the restored checkpoint returns it"
    )
    if config.ema_overwrite_frequency is not None:
        job.differences.append(
            f"ema_overwrite_frequency: {config.ema_overwrite_frequency} here, and {what} never "
            "overwrites the parameters with their average"
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
    for group in state.config.groups:
        if callable(group.lr):
            job.notes.append(
                f"learning rate: that of {group!r} does not carry over; {what} gets its rate of "
                f"the next step, {rate_at(group.lr, state.clock.iterations):g}"
            )
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        value = getattr(state.config, name)
        own = [f"{getattr(g, name):g} of {g!r}" for g in clipping_groups(state, name)]
        shown = [*([] if value is None else [f"{value:g}"]), *own]
        if shown and name not in clips:
            job.notes.append(
                f"{name}: {' and '.join(shown)} does not carry over; clip the gradients yourself "
                f"before each step of {what}"
            )
    if state.half:
        few = ", ".join(map(repr, state.half[:3])) + (" and others" if len(state.half) > 3 else "")
        job.notes.append(
            f"half precision: {few}: given as float32 masters with float32 moments; {what} keeps "
            "moments in the parameter's dtype, so train the masters"
        )


def clipping_groups(state: OptimizerState, name: str) -> list[Group]:
    """Return the groups that are trained and have the clip `name` of their own."""
    groups = state.config.groups
    return [g for g in groups if g.trainable and getattr(g, name, None) is not None]


def find_count(job: Conversion, state: OptimizerState, largest: int, what: str) -> None:
    """Add a difference if the framework's step counter cannot count on from ours."""
    if state.clock.iterations >= largest:
        job.differences.append(
            f"step: {state.clock.iterations} here, and {what} counts to {largest} at most"
        )


def _find_momentum(job: Conversion, state: OptimizerState, theirs: float, what: str) -> None:
    if not same_momentum(state, theirs):
        t, ours = state.fewest_steps + 1, schedule_decay(state.config)
        here = "there is none" if math.isinf(ours) else f"schedule_decay is {ours:g}"
        there = "no momentum schedule" if math.isinf(theirs) else f"{theirs:g}, fixed"
        job.differences.append(
            f"momentum schedule: {here} here, and {what} has {there}; the coefficient of step {t} "
            f"is {momentum(state.config, t, ours):.6g} here and "
            f"{momentum(state.config, t, theirs):.6g} there"
        )


def _find_epsilon(job: Conversion, state: OptimizerState, theirs: Formula, what: str) -> None:
    t, config = state.fewest_steps + 1, state.config
    correction = math.sqrt(1.0 - power_of_step(config.beta_2, 1.0, t))
    has_epsilon = any(own.epsilon for _, own in state.settings)
    if config.formula != theirs and has_epsilon and 1.0 - correction > _ROUNDING:
        order = ["after", "before"] if config.formula == "adam" else ["before", "after"]
        job.differences.append(
            f"epsilon: formula={config.formula!r} adds it {order[0]} the second moment's "
            f"correction, and {what} {order[1]}; they differ by a factor of {correction:.6g} at "
            f"step {t}"
        )


def _power(decay: float, t: int) -> float:
    return 0.0 if math.isinf(decay) else power_of_step(0.96, decay, t)
