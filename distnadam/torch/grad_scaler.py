"""torch's GradScaler for several workers: one loss scale for all, by the vote of all ranks."""

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from distnadam.torch.base import BaseOptimizer


class GradScaler(torch.amp.GradScaler):  # type: ignore[misc]
    """torch.amp.GradScaler, whose scale follows the vote of all ranks.

    A round in which one rank's gradients overflow is skipped by all, and the scale of all backs
    off. An optimizer of this package pushes its vote in any case, so that no rank waits for another
    that skipped; any other optimizer is treated as torch does.

    >>> import torch, distnadam
    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = distnadam.torch.DistNadam(model.parameters())
    >>> scaler = distnadam.torch.GradScaler("cpu", init_scale=4.0)
    >>> scaler.scale(model(torch.full((1, 1), torch.inf)).sum()).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    >>> scaler.get_scale()
    2.0
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Unscale the gradients if that was not done, and step; as torch's for other optimizers.

        Raises:
            RuntimeError: `step` was called since the last `update`, or a closure is given.
        """
        if not self._enabled or not isinstance(optimizer, BaseOptimizer):
            return super().step(optimizer, *args, **kwargs)
        if args or "closure" in kwargs:
            raise RuntimeError("a closure cannot be given to a step of scaled gradients")
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        found = state["found_inf_per_device"]
        overflowed = any(bool(each.item()) for each in found.values())
        optimizer.vote(overflowed)
        optimizer.step()
        assert self._scale is not None
        device = self._scale.device
        state["found_inf_per_device"] = {
            device: torch.full((), float(optimizer.overflowed), device=device)
        }
        state["stage"] = OptState.STEPPED
        return None
