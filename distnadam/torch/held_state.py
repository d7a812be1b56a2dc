"""The state of one optimizer of torch's form in this process: as it was last looked at, edited or
replaced, which the shards get at the next step.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from distnadam.nadam.step_scalars import Clock
from distnadam.tensors.arrays import Flat
from distnadam.torch.shards import Shards
from distnadam.torch.state_dict import (
    MASTER,
    NAMES,
    State,
    check_state,
    digest,
    flat_of,
    has_master,
    masters_of,
    new_state,
    same,
    state_of,
)


class HeldState:
    """What `optimizer.state` shows.

    Args:
        shards: not yet built.

    Attributes:
        by_name: the tensors.
        is_replaced: whether the state is one that the shards do not have.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._names: Mapping[torch.Tensor, str] = {}
        self.by_name: dict[str, torch.Tensor] = {}
        self.is_replaced = False
        self._state: State | None = None
        self._users: dict[Any, Any] = {}  # what users keep in it, while it is forgotten
        self._versions: list[tuple[Any, int]] = []

    @property
    def has_product(self) -> bool:
        """Whether the state has the product of a momentum schedule."""
        return self._shards.formula == "nadam"

    @property
    def is_new(self) -> bool:
        """Whether there is no state but that before the first step."""
        return not self._shards.is_built and not self.is_replaced

    @property
    def is_edited(self) -> bool:
        """Whether the state was replaced, or a tensor of it changed in place, since it was read."""
        return self.is_replaced or (
            self._state is not None and _versions(self._state) != self._versions
        )

    def name(self, names: Mapping[torch.Tensor, str]) -> None:
        """Be of these tensors, which are not stepped yet."""
        self._names = names
        self.by_name = {name: tensor for tensor, name in names.items()}
        if not self.is_replaced:
            self.forget()

    def read(self) -> State:
        """Return the state as it is now on the shards, or as it was replaced or edited here."""
        if self._state is None:
            if self._shards.is_built:
                clock, moments = self._shards.read()
                self._state = state_of(
                    self._shards.layout,
                    clock,
                    moments,
                    self.by_name,
                    has_product=self.has_product,
                    pull_dtype=self._shards.pull_dtype,
                )
            else:
                self._state = new_state([*self._names], has_product=self.has_product)
            self._versions = _versions(self._state)
            self._keep(self._users)
            self._users = {}
        return self._state

    def forget(self) -> None:
        """Read it anew when it is looked at, but for what users keep in it."""
        if self._state is not None:
            self._users = self._users_part(self._state)
        self._state = None

    def _users_part(self, state: State) -> dict[Any, Any]:
        """Return what users keep in a state: entries of their own in that of a tensor, and what is
        of no tensor.
        """
        found: dict[Any, Any] = {}
        for key, each in state.items():
            if key not in self._names:
                found[key] = each
            elif own := {name: value for name, value in each.items() if name not in NAMES}:
                found[key] = own
        return found

    def _keep(self, users: Mapping[Any, Any]) -> None:
        """Have these entries of users in the state."""
        assert self._state is not None
        for key, each in users.items():
            if key in self._names:
                self._state[key] |= each
            else:
                self._state[key] = each

    def drop(self) -> None:
        """Forget it, and what was to be given to the shards."""
        self.is_replaced = False
        self.forget()

    def replace(self, state: State) -> None:
        """Have another from the next step on, unless it is the present one to the bit."""
        full = new_state([*self._names], has_product=self.has_product)
        for tensor, each in state.items():
            if tensor in full:
                known = {*full[tensor]}
                if has_master(tensor, self._shards.pull_dtype):
                    known.add(MASTER)
                full[tensor] |= {k: _as_tensor(v) for k, v in each.items() if k in known}
        now = self.read()
        for tensor, each in full.items():  # torch's own classes have no masters
            if MASTER in now[tensor] and MASTER not in state.get(tensor, {}):
                each[MASTER] = now[tensor][MASTER]
        own = {t: {k: v for k, v in now[t].items() if k in NAMES} for t in full}
        self._state = defaultdict(dict)
        if all(same(full[tensor], own[tensor]) for tensor in full):
            self._state |= own
        else:
            self._state |= {t: {k: v.clone() for k, v in each.items()} for t, each in full.items()}
            self._versions = _versions(self._state)
            self.is_replaced = True
        self._keep(self._users_part(state))

    def check(self, state: State) -> None:
        """Raise StructureError for a state that the tensors cannot have."""
        rounding = self._shards.pull_dtype
        check_state(state, self._names, has_product=self.has_product, pull_dtype=rounding)

    def to_give(self, beta_1: float) -> tuple[str, tuple[Clock, dict[str, Flat]], dict[str, Any]]:
        """Return what the shards are to get: in words, with a digest; the clock and the moments;
        and masters by name.

        Args:
            beta_1: of the tensors' group, of which a state without products makes none.

        Raises:
            StructureError: the tensors cannot have it.
        """
        state, by_name = self.read(), self.by_name
        self.check(state)
        flat = flat_of(
            self._shards.layout, state, by_name, beta_1=None if self.has_product else beta_1
        )
        words = f"the state ({digest(state, [*self._names])})"
        return words, flat, masters_of(state, by_name, self._shards.pull_dtype)


def _as_tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))


def _versions(state: State) -> list[tuple[Any, int]]:
    """Return which tensors a state has, and how often each was changed in place."""
    return [
        (id(value), value._version)
        for tensor, each in state.items()
        if isinstance(tensor, torch.Tensor)
        for name, value in each.items()
        if name in NAMES and isinstance(value, torch.Tensor)
    ]
