"""torch's parameter groups as the optimizer's settings. Pure.

The group with the most tensors has the optimizer's own settings, and each tensor of the others is a
`Group` whose pattern is its exact name. Only lr, betas, eps and weight_decay may differ between
groups, and change from step to step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distnadam.errors import ConfigError
from distnadam.groups import Group
from distnadam.nadam.step_overrides import Rates

_FORMULA = ("momentum_decay", "decoupled_weight_decay", "maximize")
"""What all groups of an optimizer have alike."""


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ConfigError, with torch's own text, for a setting that is out of its range."""
    lr, betas = values["lr"], values["betas"]
    if getattr(lr, "numel", lambda: 1)() != 1:
        raise ConfigError("Tensor lr must be 1-element")
    for name, value in (("learning rate", lr), ("epsilon value", values["eps"])):
        if not value >= 0.0:
            raise ConfigError(f"Invalid {name}: {value}")
    for index in (0, 1):
        if not 0.0 <= betas[index] < 1.0:
            raise ConfigError(f"Invalid beta parameter at index {index}: {betas[index]}")
    for name in ("weight_decay", "momentum_decay"):
        if name in values and not values[name] >= 0.0:
            raise ConfigError(f"Invalid {name} value: {values[name]}")


def base_of(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return which group has the optimizer's own settings: the first of those with the most
    tensors.
    """
    return max(range(len(groups)), key=lambda index: (len(groups[index]["params"]), -index))


def check_formula(groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Raise ConfigError if a group asks for another formula than the optimizer has."""
    for index, group in enumerate(groups):
        for name in _FORMULA:
            if name in defaults and group.get(name, defaults[name]) != defaults[name]:
                raise ConfigError(
                    f"parameter group {index}: {name}={group[name]!r}, and the optimizer was made "
                    f"with {defaults[name]!r}: it is part of the formula, which all groups share"
                )
        for name in ("amsgrad", "differentiable", "capturable"):
            if group.get(name):
                raise ConfigError(
                    f"parameter group {index}: {name}={group[name]!r} is not supported"
                )


class Settings:
    """What the groups have at one step.

    Args:
        groups: torch's.
        names: of the tensors.
        defaults: torch's; all groups have the formula of these.

    Attributes:
        lr: learning rates, as a worker's `step` takes them.
        betas: as a worker's `step` takes them.
        decay: epsilon and weight decay of each group.

    Raises:
        ConfigError: a group asks for another formula, or betas differ between groups.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Any, str],
        defaults: Mapping[str, Any],
    ) -> None:
        check_formula(groups, defaults)
        self._groups, self._names = groups, names
        self._base = base_of(groups)
        self.betas = _betas_of(groups[self._base])
        for index, group in enumerate(groups):
            if (given := _betas_of(group)) != self.betas:
                raise ConfigError(
                    f"parameter group {index}: betas={given!r}, and another group has "
                    f"{self.betas!r}: all groups must have the same"
                )
        rates = [float(group["lr"]) for group in groups]
        self.lr: Rates = rates[0]
        if len(groups) > 1:
            self.lr = {None: rates[self._base]}
            self.lr |= {name: rates[index] for index, name in self._others()}
        self.decay = [(float(group["eps"]), float(group["weight_decay"])) for group in groups]

    def _others(self) -> list[tuple[int, str]]:
        """Return the group and the name of each tensor that is a `Group`."""
        found = [
            (index, self._names[tensor])
            for index, group in enumerate(self._groups)
            if index != self._base
            for tensor in group["params"]
        ]
        return list(dict.fromkeys(found))  # torch only warns of one that is given twice

    def config(self) -> dict[str, Any]:
        """Return what `set_config` takes: all but rates and betas, which go with a step."""
        epsilon, weight_decay = self.decay[self._base]
        own = [
            Group(name, epsilon=self.decay[index][0], weight_decay=self.decay[index][1])
            for index, name in self._others()
        ]
        return {"epsilon": epsilon, "weight_decay": weight_decay, "groups": own}


def _betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    beta_1, beta_2 = group["betas"]
    return float(beta_1), float(beta_2)
