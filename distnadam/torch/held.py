"""What one optimizer of torch's form holds in this process: the model's tensors by name, the worker
and the shards, and the state as it was last looked at.

It is one object, however many wrappers share the optimizer's attributes, as Lightning's does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distnadam.errors import StructureError
from distnadam.torch.gradients import Gradients
from distnadam.torch.groups import Settings
from distnadam.torch.parameters import Parameters
from distnadam.torch.shards import Shards
from distnadam.torch.state_dict import State, check_state, flat_of, new_state, same, state_of

HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Held:
    """The running part of an optimizer.

    Args:
        shards: not yet built.

    Attributes:
        names: of the tensors.
        vote: whether this rank's gradients for the coming round overflowed.
        overflowed: whether the last round was skipped by a vote.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.vote = False
        self.overflowed = False
        self.names: dict[torch.Tensor, str] = {}
        self._names: list[str] = []
        self._tensors: list[torch.Tensor] = []
        self._running: _Running | None = None
        self._state: State | None = None
        self._versions: list[tuple[Any, int]] = []
        self._is_replaced = False  # the state, by one that the shards do not have

    @property
    def has_product(self) -> bool:
        """Whether the state has the product of a momentum schedule."""
        return self.shards.formula == "nadam"

    @property
    def is_new(self) -> bool:
        """Whether there is no state but that before the first step."""
        return not self.shards.is_built and not self._is_replaced

    def name(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Have these tensors, which are not stepped yet, by these names."""
        self._names = list(names)
        self._tensors = list(tensors)
        self.names = dict(zip(tensors, names, strict=True))
        if not self._is_replaced:
            self._state = None

    # -- the state

    def state(self) -> State:
        """Return the state as it is now on the shards, or as it was replaced or edited here."""
        if self._state is None:
            if self.shards.is_built:
                clock, moments = self.shards.read()
                layout = self.shards.optimizer.shards.layout
                self._state = state_of(
                    layout, clock, moments, self._by_name(), has_product=self.has_product
                )
            else:
                self._state = new_state(self._tensors, has_product=self.has_product)
            self._versions = _versions(self._state)
        return self._state

    def replace_state(self, state: State) -> None:
        """Have another state from the next step on, unless it is the present one to the bit."""
        full = new_state(self._tensors, has_product=self.has_product)
        for tensor, each in state.items():
            if tensor in full:
                full[tensor] |= {k: _as_tensor(v) for k, v in each.items() if k in full[tensor]}
        if same(full, self.state()):
            return
        self._state = {tensor: {k: v.clone() for k, v in e.items()} for tensor, e in full.items()}
        self._versions = _versions(self._state)
        self._is_replaced = True

    @property
    def _is_edited(self) -> bool:
        """Whether the state was replaced, or a tensor of it changed in place, since it was read."""
        return self._is_replaced or (
            self._state is not None and _versions(self._state) != self._versions
        )

    def _by_name(self) -> dict[str, torch.Tensor]:
        return dict(zip(self._names, self._tensors, strict=True))

    # -- a step

    def has_gradients(self) -> bool:
        """Whether any tensor has a gradient."""
        return any(tensor.grad is not None for tensor in self._tensors)

    def step(self, settings: Settings) -> None:
        """Push the gradients, wait for the round, and write the new parameters into the tensors.

        Args:
            settings: what the groups have at this step.
        """
        if self._running is None:
            self._running = self._build(settings)
        else:
            self._take_over(self._running.parameters, settings)
        parameters, gradients = self._running.parameters, self._running.gradients
        absent = gradients.gather()
        vote, self.vote = self.vote, False
        if absent and not vote:
            self._refuse_absent(absent)
        self.shards.configure(settings)
        tree = self.shards.step(settings, found_inf=vote)
        self.overflowed = self.shards.worker.found_inf
        parameters.take(tree)
        self._state = None

    def _refuse_absent(self, absent: Sequence[int]) -> None:
        raise StructureError(
            f"{self._names[absent[0]]!r} has no gradient (None; {len(absent)} have none): leave "
            "what does not train out of the optimizer"
        )

    def _build(self, settings: Settings) -> "_Running":
        running = _Running(
            Parameters(self._names, self._tensors), Gradients(self._names, self._tensors)
        )
        self.shards.build(running.parameters.as_tree(), settings)
        dtypes = {tensor.dtype for tensor in self._tensors} - {torch.float64}
        half = HALF.get(dtypes.pop()) if len(dtypes) == 1 else None
        running.gradients.open(self.shards.gradients(half), in_place=True)
        if self._is_edited:
            self._upload(None, settings)
        running.parameters.hand_out(self.shards.pull())
        return running

    def _take_over(self, parameters: Parameters, settings: Settings) -> None:
        """Give the shards what was changed here since the last step."""
        changed = parameters.changed()
        if changed or self._is_edited:
            self._upload(parameters.as_tree() if changed else None, settings)
            parameters.hand_out(self.shards.pull())

    def _upload(self, params: Mapping[str, Any] | None, settings: Settings) -> None:
        if not self._is_edited:
            self.shards.replace(params)
            return
        state, layout = self.state(), self.shards.optimizer.shards.layout
        beta_1 = None if self.has_product else settings.betas[0]
        check_state(state, self.names)
        clock, moments = flat_of(layout, state, self._by_name(), beta_1=beta_1)
        self.shards.replace(params, clock, moments)
        self._is_replaced = False

    def close(self) -> None:
        """Take the hooks away, and end the shards if this process made them."""
        if self._running is not None:
            self._running.gradients.close()
        self.shards.close()


@dataclass(frozen=True)
class _Running:
    """The tensors of an optimizer whose shards are built."""

    parameters: Parameters
    gradients: Gradients


def _as_tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))


def _versions(state: State) -> list[tuple[Any, int]]:
    """Return which tensors a state has, and how often each was changed in place."""
    return [(id(value), value._version) for each in state.values() for value in each.values()]
