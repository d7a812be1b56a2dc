"""Objects whose attributes are fixed: an assignment that would have no effect is refused.

It says what to do instead; it knows the names of the settings, and no values.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from distnadam.config import CHANGEABLE, Options, Topology
from distnadam.errors import NoSuchSetting
from distnadam.hyperparameters import NadamConfig

_FIXED = {f.name for record in (NadamConfig, Topology) for f in dataclasses.fields(record)} | {
    "options"
}
_OPTIONS = {f.name for f in dataclasses.fields(Options)}
_ALSO_CALLED = {"learning_rate": "lr", "eps": "epsilon", "betas": "beta_1", "momentum": "beta_1"}


class FixedAttributes:
    """A base whose public attributes are those of its class, and those that `__init__` sets once.

    Any other assignment raises NoSuchSetting (an AttributeError).

    Args:
        set_once: names of the latter.
    """

    _set_once: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, set_once: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._set_once |= frozenset(set_once)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            known = getattr(type(self), name, None)
            if name in self._set_once:
                settable = name not in vars(self)
            else:
                settable = known is not None and getattr(known, "fset", self) is not None
            if not settable:
                is_known = known is not None or name in self._set_once
                raise NoSuchSetting(_refusal(type(self).__name__, name, is_known=is_known))
        object.__setattr__(self, name, value)


def _refusal(owner: str, name: str, *, is_known: bool) -> str:
    setting = _ALSO_CALLED.get(name, name)
    if setting == "lr":
        remedy = "set lr, of the optimizer: optimizer.lr = ..."
    elif setting in CHANGEABLE:
        remedy = f"call set_config, of the optimizer: optimizer.set_config({setting}=...)"
    elif setting in _FIXED:
        remedy = f"it is fixed when the optimizer is made: {owner}({setting}=...)"
    elif setting in _OPTIONS:
        remedy = f"it is fixed when the optimizer is made: {owner}(options=Options({setting}=...))"
    elif is_known:
        remedy = "it is given by the state, which set_params and set_weights replace"
    else:
        near = difflib.get_close_matches(name, sorted(_FIXED | _OPTIONS | _ALSO_CALLED.keys()), n=1)
        meant = _ALSO_CALLED.get(near[0], near[0]) if near else None
        remedy = f"did you mean {meant}?" if meant else "there is no such attribute"
    return f"{owner}.{name} cannot be set: {remedy}"
