"""What one optimizer of torch's form holds in this process: the model's tensors by name, the worker
and the shards.

It is one object, however many wrappers share the optimizer's attributes, as Lightning's does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distnadam.errors import LifecycleError, NonFiniteGradient, RanksDisagree, Rewound
from distnadam.shield import shield
from distnadam.torch.arrays import as_torch
from distnadam.torch.checkpoints import beside, check_beside, read_checkpoint
from distnadam.torch.ddp import find_wrapper, require_no_all_reduce
from distnadam.torch.device_copies import PinnedMemory, device_of
from distnadam.torch.gradients import Gradients
from distnadam.torch.groups import Settings, check_formula, values_of
from distnadam.torch.held_state import HeldState
from distnadam.torch.parameters import Parameters
from distnadam.torch.shards import Shards
from distnadam.torch.state_dict import HALF


class Held:
    """The running part of an optimizer.

    Args:
        shards: not yet built.
        overlap: whether gradients are sent as the backward pass yields them.
        push_dtype: to which gradients are rounded; None: they are not.

    Attributes:
        state: each tensor's clock and moments, as torch has them.
        names: of the tensors.
        vote: whether this rank's gradients for the coming round overflowed.
        clip: the largest norm of the mean gradient of the coming round; None does not clip.
        norm: what the step fills with the norm where it clips.
        overflowed: whether the last round was skipped by a vote.
    """

    def __init__(
        self, shards: Shards, *, overlap: bool = False, push_dtype: str | None = None
    ) -> None:
        self.shards = shards
        self.state = HeldState(shards)
        self._push_dtype = push_dtype
        self._overlap = overlap
        self.vote = False
        self.overflowed = False
        self.clip: float | None = None
        self.norm = torch.full((), math.nan)
        self.names: dict[torch.Tensor, str] = {}
        self._known: Settings | None = None
        self._values: list[tuple[Any, ...]] = []  # that it is made of
        self._names: list[str] = []
        self._tensors: list[torch.Tensor] = []
        self._running: _Running | None = None
        self._pinned = PinnedMemory()
        self._seen: list[int] = []
        self._is_pushed = False  # each gradient by itself, as the backward pass yields it
        self._is_cut = False  # a step, before the tensors had its round

    def name(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Have these tensors, which are not stepped yet, by these names."""
        self._names = list(names)
        self._tensors = list(tensors)
        self._known = None
        self.names = dict(zip(tensors, names, strict=True))
        self.state.name(self.names)

    # -- a step

    def has_gradients(self) -> bool:
        """Whether any tensor has a gradient."""
        return any(tensor.grad is not None for tensor in self._tensors)

    def settings(self, groups: Sequence[Mapping[str, Any]]) -> Settings:
        """Return what the groups have now; the very object of before where nothing has changed.

        Raises:
            ConfigError: it is another formula than the shards have.
        """
        values = values_of(groups)
        known = self._known
        if known is None or known.clip != self.clip or self._values != values:
            check_formula(groups, self.shards.fixed)
            known = self._known = Settings(groups, self.names, self.clip)
            self._values = values
        return known

    def step(self, settings: Settings) -> None:
        """Push the gradients, wait for the round, and write the new parameters into the tensors.

        Args:
            settings: what the groups have at this step.
        """
        if self._running is None:
            with torch.no_grad():
                self._running = self._build(settings)
        # shards of this process, the tensors and the state are of one round, whatever interrupts it
        with self.shards.optimizer.shards.backend.shield:
            try:
                self._step(self._running, settings)
            except Rewound:
                self._go_back(self._running)
                raise
            except BaseException:
                if self.shards.worker.session.in_flight is not None:
                    with shield:
                        self._is_cut = True
                        self._running.gradients.leave()
                raise

    def _step(self, running: "_Running", settings: Settings) -> None:
        parameters, gradients = running.parameters, running.gradients
        if self._is_cut:
            self._complete(running)
        self._take_over(parameters, settings)
        given = self._sent(gradients) if self._is_pushed else gradients.gather()
        vote, self.vote, self.clip = self.vote, False, None
        self.state.forget()
        self._is_cut = True
        try:
            stepped = self.shards.step(settings, None if vote else given, found_inf=vote)
        except (NonFiniteGradient, RanksDisagree):  # no shard has moved
            self._is_cut = False
            raise
        self.overflowed = self.shards.worker.found_inf
        if settings.clip is not None:
            norm = self.shards.worker.gradient_norm
            self.norm.fill_(math.nan if norm is None else norm)
        self._pin()
        with shield:
            parameters.take(stepped)
            self._is_cut = False

    def _complete(self, running: "_Running") -> None:
        """Complete the push in flight, if any, and have the shards' parameters in the tensors, but
        for those that were changed since they were last written.
        """
        parameters = running.parameters
        changed = [parameters.tensors[index] for index in parameters.changed()]
        kept = [tensor.detach().clone() for tensor in changed]
        stepped = self.shards.pull()
        with shield, torch.no_grad():
            parameters.hand_out(stepped)
            parameters.take(stepped)
            for tensor, value in zip(changed, kept, strict=True):
                tensor.copy_(value)
            running.gradients.are_read = self._is_cut = False
        if not self.state.is_edited:
            self.state.forget()

    def _go_back(self, running: "_Running") -> None:
        """Have what the shards went back to; what was changed here was of a later round."""
        running.parameters.forget()
        self.state.drop()
        self._is_cut = True
        self._complete(running)

    def _sent(self, gradients: Gradients) -> dict[str, Any] | None:
        """Send what the backward pass has not; return what to push where it has sent nothing."""
        push = self.shards.worker.push_tensor
        return None if gradients.gather_sent(push) else dict.fromkeys(self._names)

    def _push_tensor(self, name: str, gradient: Any) -> None:
        """Push one tensor's gradient from the backward pass."""
        try:
            self.shards.worker.push_tensor(name, gradient)
        except Rewound:
            assert self._running is not None
            self._go_back(self._running)
            raise

    def rejoin(self, settings: Settings) -> None:
        """Have the parameters of a training that this rank takes part in again."""
        parameters = Parameters(self._names, self._tensors, self._pinned)
        if self.shards.rejoin(parameters.as_tree(), settings):
            self._running = self._open(parameters, in_place=self._may_move_gradients())
            self._complete(self._running)

    def _build(self, settings: Settings) -> "_Running":
        parameters = Parameters(self._names, self._tensors, self._pinned)
        in_place = self._may_move_gradients()
        self.shards.build(parameters.as_tree(), settings)
        is_here = device_of(self._tensors) is None
        memory = self.shards.share_parameters() if is_here else ()
        running = self._open(parameters, in_place=in_place)
        parameters.hand_out(self.shards.pull())
        if is_here:
            parameters.move_in(memory)
        return running

    def _may_move_gradients(self) -> bool:
        """Whether hooks may; not those of a DDP that has them as views of its buckets.

        Raises:
            LifecycleError: a DDP averages them too.
        """
        wrapper = find_wrapper(self._tensors) if self.shards.several else None
        if wrapper is None:
            return True
        require_no_all_reduce(wrapper)
        return not wrapper.gradient_as_bucket_view

    def _open(self, parameters: Parameters, *, in_place: bool) -> "_Running":
        gradients = Gradients(self._names, self._tensors)
        dtypes = {tensor.dtype for tensor in self._tensors} - {torch.float64}
        half = self._push_dtype or (HALF.get(dtypes.pop()) if len(dtypes) == 1 else None)
        # On a GPU gradients cross to their slots, unless pieces of them then go on to other hosts.
        is_here = device_of(self._tensors) is None
        self._is_pushed = self._overlap and (is_here or self.shards.are_far)
        self._pin()
        if self._is_pushed:
            gradients.send(self._push_tensor)
        else:
            in_place = in_place and not self._overlap
            gradients.open(self.shards.gradients(half), self._pinned, in_place=in_place)
            if self._overlap:
                gradients.send(None)
        return _Running(parameters, gradients)

    def _pin(self) -> None:
        """Register the memory that is shared with the shards now, if the model is on a GPU."""
        if device_of(self._tensors) is None:
            return
        memory = self.shards.memory(gradients=not self._is_pushed)
        known = [*map(id, memory)]
        if known != self._seen:
            self._pinned.hold(memory)
            self._seen = known

    def _take_over(self, parameters: Parameters, settings: Settings) -> None:
        """Give the shards what was changed here since the last step, if all ranks have changed the
        same.
        """
        if parameters.have_left():
            self.shards.move_parameters()
            parameters.hand_out(self.shards.pull())
        parameters.require_finite()
        changed, is_edited = parameters.changed(), self.state.is_edited
        if changed or is_edited or self.shards.differ(settings):
            with torch.no_grad():
                self._give(parameters, settings, changed, is_edited=is_edited)

    def _give(
        self, parameters: Parameters, settings: Settings, changed: Sequence[int], *, is_edited: bool
    ) -> None:
        words, flat = [], None
        exact: dict[str, Any] = {}
        if changed:
            words.append(parameters.in_words(changed))
        if self.shards.differ(settings):
            words.append(settings.in_words())
        if is_edited:
            said, flat, exact = self.state.to_give(settings.betas[0])
            words.append(said)
        params = parameters.as_tree() | exact if changed or exact else None
        names = frozenset(self._names[index] for index in changed) | exact.keys()
        try:
            self.shards.replace("; ".join(words), settings, params, names, flat)
        except RanksDisagree as error:
            if self.shards.worker.session.round == 1:
                error.add_note(
                    "before the first step all ranks must have the same parameters: seed all alike "
                    "(torch.manual_seed) before the model is made, or load the same state_dict"
                )
            raise
        self.state.is_replaced = False
        parameters.hand_out(self.shards.pull())

    # -- checkpoints

    def save(
        self, path: str, groups: Sequence[Mapping[str, Any]], buffers: Mapping[str, torch.Tensor]
    ) -> str:
        """Write the shards' checkpoint with the groups' settings and buffers beside it."""
        if not self.shards.is_built:
            raise LifecycleError("save: there is nothing to save before the first step")
        return self.shards.optimizer.save(path, data=beside(groups, buffers))

    def load(
        self, path: str, num_groups: int, buffers: Mapping[str, torch.Tensor]
    ) -> list[dict[str, Any]]:
        """Take parameters, state and buffers from a checkpoint; return the groups' settings."""
        loaded = read_checkpoint(
            path,
            self.state.by_name,
            has_product=self.state.has_product,
            pull_dtype=self.shards.pull_dtype,
        )
        groups, kept = check_beside(loaded.beside, num_groups, buffers)
        with torch.no_grad():
            for name, tensor in self.state.by_name.items():
                tensor.copy_(as_torch(loaded.params[name]))
            for name, buffer in buffers.items():
                buffer.copy_(as_torch(kept[name]))
        self.state.replace(loaded.state)
        return groups

    def drop(self) -> None:
        """Take the hooks away, and leave without waiting for anybody."""
        if self._running is not None:
            self._running.gradients.close()
            self._pinned.close()
        self.shards.leave()

    def close(self) -> None:
        """Take the hooks away, and end the shards if this process made them."""
        if self._running is not None:
            self._running.gradients.close()
            self._pinned.close()
        self.shards.close()


@dataclass(frozen=True)
class _Running:
    """The tensors of an optimizer whose shards are built."""

    parameters: Parameters
    gradients: Gradients
