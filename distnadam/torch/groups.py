"""torch's parameter groups as the optimizer's settings. Pure.

The group with the most tensors has the optimizer's own settings, and each tensor of the others is a
`Group` whose pattern is its exact name. Only lr, betas, eps and weight_decay may differ between
groups, and change from step to step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnadam.errors import ConfigError
from distnadam.groups import Group
from distnadam.nadam.step_overrides import Rates

_FORMULA = {
    "momentum_decay": "schedule_decay",
    "decoupled_weight_decay": "decoupled_weight_decay",
    "maximize": "maximize",
}
"""What all groups of an optimizer have alike: torch's names, and ours."""


_REFUSED = ("amsgrad", "differentiable", "capturable")


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ConfigError, with torch's own text, for a setting that is out of its range."""
    lr, betas = values["lr"], values["betas"]
    if getattr(lr, "numel", lambda: 1)() != 1:
        raise ConfigError("Tensor lr must be 1-element")
    for name, value in (("learning rate", lr), ("epsilon value", values["eps"])):
        if not value >= 0.0:
            raise ConfigError(f"Invalid {name}: {value}")
    if len({hasattr(beta, "numel") for beta in betas}) > 1:
        raise ConfigError("betas must be either both floats or both Tensors")
    for index in (0, 1):
        if getattr(betas[index], "numel", lambda: 1)() != 1:
            raise ConfigError(f"Tensor betas[{index}] must be 1-element")
        if not 0.0 <= betas[index] < 1.0:
            raise ConfigError(f"Invalid beta parameter at index {index}: {betas[index]}")
    for name in ("weight_decay", "momentum_decay"):
        if name in values and not values[name] >= 0.0:
            raise ConfigError(f"Invalid {name} value: {values[name]}")


def check_names(names: Sequence[Any]) -> None:
    """Raise ConfigError unless each tensor has a name of its own that can be a pattern."""
    known = set()
    for name in names:
        if not isinstance(name, str) or not name.strip("./") or "*" in name:
            raise ConfigError(
                f"a parameter's name must be a str such as 'layer.weight', without *, got {name!r}"
            )
        if name in known:
            raise ConfigError(f"two parameters are called {name!r}: give each a name of its own")
        known.add(name)


def base_of(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return which group has the optimizer's own settings: the first of those with the most
    tensors.
    """
    return max(range(len(groups)), key=lambda index: (len(groups[index]["params"]), -index))


def formula_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of the formula by our names, which all groups must have alike.

    Raises:
        ConfigError: a group has another, or one that is not supported.
    """
    first = groups[0] if groups else {}
    for index, group in enumerate(groups):
        for name in _FORMULA:
            if group.get(name) != first.get(name):
                raise ConfigError(
                    f"parameter group {index}: {name}={group.get(name)!r}, and group 0 has "
                    f"{first.get(name)!r}: it is part of the formula, which all groups share"
                )
        for name in _REFUSED:
            if group.get(name):
                raise ConfigError(
                    f"parameter group {index}: {name}={group[name]!r} is not supported"
                )
    return {ours: first[name] for name, ours in _FORMULA.items() if name in first}


def check_formula(groups: Sequence[Mapping[str, Any]], expected: Mapping[str, Any]) -> None:
    """Raise ConfigError if groups have another formula than the shards were built with."""
    found = formula_of(groups)
    for name, ours in _FORMULA.items():
        if ours in expected and found.get(ours, expected[ours]) != expected[ours]:
            raise ConfigError(
                f"{name}={found[ours]!r}, and the shards were built with {expected[ours]!r}: it is "
                "part of the formula, which cannot change"
            )


def values_of(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return all that `Settings` are made of but the tensors; equal where nothing has changed."""
    return [
        (
            float(group["lr"]),
            *_betas_of(group),
            float(group["eps"]),
            float(group["weight_decay"]),
            *map(group.get, _FORMULA),
            *map(group.get, _REFUSED),
        )
        for group in groups
    ]


class Settings:
    """What the groups have at one step.

    Args:
        groups: torch's.
        names: of the tensors.
        clip: the largest norm of the mean gradient over all tensors; None does not clip.

    Attributes:
        formula: the settings of the formula, by our names.
        lr: learning rates, as a worker's `step` takes them.
        betas: those of the group that has the optimizer's settings, as `step` takes them.
        own: what each group has beside them, and the clip.

    Raises:
        ConfigError: groups have different formulas.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Any, str],
        clip: float | None = None,
    ) -> None:
        self.formula = formula_of(groups)
        self.clip = clip
        self._given, self._names = groups, names
        self._base = base_of(groups)
        self.betas = _betas_of(groups[self._base])
        rates = [float(group["lr"]) for group in groups]
        self.lr: Rates = rates[0]
        if len(groups) > 1:
            self.lr = {None: rates[self._base]}
            self.lr |= {name: rates[index] for index, name in self._others()}
        self.groups = [_Own.of(group, self.betas) for group in groups]
        self.own = self.groups, clip

    def _others(self) -> list[tuple[int, str]]:
        """Return the group and the name of each tensor that is a `Group`."""
        found = [
            (index, self._names[tensor])
            for index, group in enumerate(self._given)
            if index != self._base
            for tensor in group["params"]
        ]
        return list(dict.fromkeys(found))  # torch only warns of one that is given twice

    def config(self) -> dict[str, Any]:
        """Return what `set_config` takes: all but rates and betas, which go with a step."""
        base, each = self.groups[self._base], self.groups
        groups = [
            Group(
                name,
                beta_1=each[index].beta_1,
                beta_2=each[index].beta_2,
                epsilon=each[index].eps,
                weight_decay=each[index].weight_decay,
            )
            for index, name in self._others()
        ]
        return {
            "epsilon": base.eps,
            "weight_decay": base.weight_decay,
            "groups": groups,
            "global_clipnorm": self.clip,
        }

    def plain_config(self) -> dict[str, Any]:
        """Return `config` as `get_config` has it."""
        config = self.config()
        return config | {"groups": [group.to_dict() for group in config["groups"]]}

    def in_words(self) -> str:
        """Return what `config` has, for the other ranks."""
        words = [f"group {number}: {own}" for number, own in enumerate(self.groups)]
        return "; ".join([*words, f"clip_grad_norm_({self.clip!r})"])


@dataclass(frozen=True)
class _Own:
    """What a group has beside its rate: betas where they are not the optimizer's."""

    eps: float
    weight_decay: float
    beta_1: float | None
    beta_2: float | None

    @classmethod
    def of(cls, group: Mapping[str, Any], betas: tuple[float, float]) -> "_Own":
        own = _betas_of(group)
        return cls(
            float(group["eps"]),
            float(group["weight_decay"]),
            *((None, None) if own == betas else own),
        )

    def __str__(self) -> str:
        betas = "" if self.beta_1 is None else f", betas=({self.beta_1!r}, {self.beta_2!r})"
        return f"eps={self.eps!r}, weight_decay={self.weight_decay!r}{betas}"


def _betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    beta_1, beta_2 = group["betas"]
    return float(beta_1), float(beta_2)
