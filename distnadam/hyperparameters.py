"""The hyper-parameters of a step: its formula and their values.

They are frozen, validated when they are constructed, and become plain data for a checkpoint. No
I/O and no arrays here.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from distnadam.checks import BETAS, check_beta, check_count, check_flag, fields_of, set_number
from distnadam.errors import ConfigError
from distnadam.groups import Group
from distnadam.loss_scale import LossScale
from distnadam.schedules import Rate, Schedule, kept, rate_at, rate_from, rate_to_dict
from distnadam.tensors.arrays import STATE_ARRAYS

DEFAULT_EPSILON = 1e-7
DEFAULT_SCHEDULE_DECAY = 0.004

PullDtype = Literal["bfloat16"]
"""A dtype to which parameters are rounded for workers."""
Clocks = Literal["one", "tensor"]
"""Whose steps are counted, and momentum coefficients multiplied: all tensors' together, or each's.
"""
Formula = Literal["nadam", "nadam_optax", "nadam_algoperf", "adam", "adam_keras"]
"""What is computed from the moments: Nadam with the momentum schedule of TensorFlow 1.13, torch and
Keras 3; with the constant momentum of optax, or as AlgoPerf publishes it; Adam as torch and optax
compute it, or as Keras does, which adds epsilon before the second moment's correction.
"""


@dataclass(frozen=True)
class NadamConfig:
    """The hyper-parameters; the defaults are the reference's, Keras's Nadam of TensorFlow 1.13.

    Args:
        lr: learning rate, a number or a function of the number of steps applied.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment.
        schedule_decay: decay of the momentum schedule, which only the formula "nadam" has.
        clipnorm: largest norm of each tensor's mean gradient.
        clipvalue: largest absolute value of each element of the mean gradient.
        global_clipnorm: largest norm over all tensors; not together with `clipnorm`.
        sum_group: ranks whose gradients are summed before the groups' sums are added, at least 1:
            rank r is in group r // sum_group. The bits depend on it.
        pull_dtype: the dtype in which workers see the parameters whose master is float32:
            "bfloat16", or None for their own.
        formula: see `Formula`.
        weight_decay: what a step takes from each parameter.
        decoupled_weight_decay: whether that is ``lr * weight_decay`` of the parameter before the
            step; else `weight_decay` of it is added to the mean gradient, once that is clipped.
        maximize: whether the mean gradient is negated, before it is clipped.
        groups: tensors with settings of their own; the first group that matches one holds.
        use_ema: whether an exponential moving average of the parameters is kept.
        ema_momentum: the weight of the average so far in the next one, in [0, 1].
        ema_overwrite_frequency: after how many steps the parameters become the average, again and
            again; None: never.
        clocks: "one" for all tensors, which all step at every step; or one of each "tensor", which
            steps where it has a gradient.
        loss_scale: the dynamic scale of workers' losses; None: they are not scaled.

    Raises:
        ConfigError: a value is out of its range, or has no meaning beside the others, or a
            `Schedule` cannot be stored.
    """

    lr: Rate = 0.002
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = DEFAULT_EPSILON
    schedule_decay: float = DEFAULT_SCHEDULE_DECAY
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    sum_group: int = 1
    pull_dtype: PullDtype | None = None
    formula: Formula = "nadam"
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    maximize: bool = False
    groups: Sequence[Group] = ()
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    clocks: Clocks = "one"
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        if not callable(self.lr):
            set_number(self, "lr")
            rate_at(self.lr, 0)
        object.__setattr__(self, "lr", kept(self.lr))
        for name in ("epsilon", "schedule_decay", "weight_decay"):
            set_number(self, name)
        for name in ("decoupled_weight_decay", "maximize", "use_ema"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        self._check_formula()
        self._check_groups()
        self._check_average_and_scale()
        for name in BETAS:
            check_beta(self, name)
        if not isinstance(self.clocks, str) or self.clocks not in get_args(Clocks):
            raise ConfigError(f"clocks must be 'one' or 'tensor', got {self.clocks!r}")
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            if getattr(self, name) is not None:
                set_number(self, name)
        object.__setattr__(self, "sum_group", check_count("sum_group", self.sum_group, least=1))
        if self.clipnorm is not None and self.global_clipnorm is not None:
            raise ConfigError(
                f"clipnorm={self.clipnorm!r} and global_clipnorm={self.global_clipnorm!r} cannot "
                "both be set: give one of them"
            )
        if self.pull_dtype is not None:
            object.__setattr__(self, "pull_dtype", check_bfloat16("pull_dtype", self.pull_dtype))

    def _check_formula(self) -> None:
        known = get_args(Formula)
        if not isinstance(self.formula, str) or self.formula not in known:
            raise ConfigError(
                f"formula must be one of {', '.join(map(repr, known))}, got {self.formula!r}"
            )
        if not self.has_momentum_schedule and self.schedule_decay != DEFAULT_SCHEDULE_DECAY:
            raise ConfigError(
                f"schedule_decay={self.schedule_decay!r} has no effect with "
                f"formula={self.formula!r}, whose momentum is constant: leave it out"
            )

    def _check_groups(self) -> None:
        if isinstance(self.groups, (str, Mapping)) or not isinstance(self.groups, Iterable):
            raise ConfigError(f"groups must be a list of Group, got {self.groups!r}")
        groups = tuple(map(Group.of, self.groups))
        object.__setattr__(self, "groups", groups)
        clipping = next((group for group in groups if group.clipnorm is not None), None)
        if clipping is not None and self.global_clipnorm is not None:
            raise ConfigError(
                f"global_clipnorm={self.global_clipnorm!r} and the clipnorm of {clipping!r} cannot "
                "both be set: give one of them"
            )

    def _check_average_and_scale(self) -> None:
        if self.loss_scale is not None:
            object.__setattr__(self, "loss_scale", LossScale.of(self.loss_scale))
        if set_number(self, "ema_momentum") > 1.0:
            raise ConfigError(f"ema_momentum must be in [0, 1], got {self.ema_momentum!r}")
        if (count := self.ema_overwrite_frequency) is not None:
            checked = check_count("ema_overwrite_frequency", count, least=1)
            object.__setattr__(self, "ema_overwrite_frequency", checked)

    @cached_property
    def state_arrays(self) -> tuple[str, ...]:
        """The names of the arrays that make up the state, in the order of a checkpoint's files."""
        return (*STATE_ARRAYS, "ema") if self.use_ema else STATE_ARRAYS

    @cached_property
    def group_settings(self) -> tuple["NadamConfig", ...]:
        """For each group, these hyper-parameters with what it has of its own but its rate."""
        return tuple(
            dataclasses.replace(
                self,
                groups=(),
                **{
                    name: value
                    for name in (*BETAS, "epsilon", "weight_decay", "clipnorm", "clipvalue")
                    if (value := getattr(group, name)) is not None
                },
            )
            for group in self.groups
        )

    @cached_property
    def tells_clocks_apart(self) -> bool:
        """Whether tensors may have other clocks than the optimizer's."""
        return self.clocks == "tensor" or (
            self.has_momentum_schedule and any(group.beta_1 is not None for group in self.groups)
        )

    @cached_property
    def has_momentum_schedule(self) -> bool:
        """Whether the momentum coefficient changes from step to step."""
        return self.formula == "nadam"

    @cached_property
    def clips_by_norm(self) -> bool:
        """Whether a step needs norms before it can be applied."""
        return self.global_clipnorm is not None or any(
            each.clipnorm is not None for each in (self, *self.group_settings)
        )

    @cached_property
    def is_plain(self) -> bool:
        """Whether `to_dict` can say them: the learning rate is no plain function."""
        return not callable(self.lr) or isinstance(self.lr, Schedule)

    def in_words(self) -> str:
        """Return the formula in a few words, with weight decay, sign and groups where there are.

        >>> NadamConfig(formula="adam", groups=[Group("**/bias", trainable=False)]).in_words()
        "adam, groups '**/bias' (frozen)"
        """
        how = "" if self.decoupled_weight_decay else " (coupled)"
        decay = [f"weight decay {self.weight_decay:g}{how}"] if self.weight_decay else []
        sign = ["maximize"] if self.maximize else []
        named = ", ".join(
            f"{group.pattern!r}{'' if group.trainable else ' (frozen)'}" for group in self.groups
        )
        return ", ".join([self.formula, *decay, *sign, *([f"groups {named}"] if named else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `from_dict`; raise ConfigError if `lr` is a plain function."""
        groups = [group.to_dict() for group in self.groups]
        scale = None if self.loss_scale is None else self.loss_scale.to_dict()
        special = {"lr": rate_to_dict(self.lr), "groups": groups, "loss_scale": scale}
        return {**fields_of(self), **special}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NadamConfig":
        """Return the config of the plain data that `to_dict` returned."""
        return cls(**{**data, "lr": rate_from(data["lr"])})


def check_bfloat16(what: str, given: Any) -> PullDtype:
    """Return the name of the dtype to which numbers may be rounded on their way; raise ConfigError
    for any other.
    """
    if isinstance(given, str) and given == "bfloat16":
        return "bfloat16"
    name = str(getattr(given, "__name__", given)).rpartition(".")[2]  # of a type, or of torch's
    why = {
        "bfloat16": "; give its name, a str",
        "float16": ": numbers beyond 65504 would be infinite in float16",
        "float32": "; None is each tensor's own",
    }.get(name, "")
    raise ConfigError(f"{what} must be None or 'bfloat16', got {given!r}{why}")
