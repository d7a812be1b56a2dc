"""`torch.optim.Optimizer`s of our own formulas: torch's arguments and defaults first, then ours."""

from typing import Any

import torch

from distnadam.torch.base import BaseOptimizer


class DistNadam(BaseOptimizer):
    """torch.optim.NAdam, with its state on shards.

    Args:
        params: tensors, (name, tensor) pairs as `named_parameters()` yields them, or groups; names
            are those of checkpoints and errors.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: what each step takes from a parameter, by way of the gradient (L2).
        momentum_decay: how fast the momentum schedule approaches beta_1.
        decoupled_weight_decay: whether weight decay is apart from the gradient, as AdamW's.
        maximize: step along the gradient.
        others: rank, num_workers, num_shards, replicas, backend, name and options, which are as
            `distnadam.DistNadam` has them, and overlap, pull_dtype and push_dtype, as
            `BaseOptimizer`; all may be left out.

    Raises:
        ConfigError: (a ValueError) a setting is out of its range, in torch's own words.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = DistNadam([("weight", weight)], lr=0.1)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> [round(value, 4) for value in weight.tolist()]
    [0.8944, 0.8944]
    """

    _formula = "nadam"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **others: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **others)


class DistNadamW(DistNadam):
    """`DistNadam` with decoupled weight decay of 0.01, as torch.optim.AdamW is of Adam.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> DistNadamW([weight], lr=0.1).param_groups[0]["weight_decay"]
    0.01
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = True,
        *,
        maximize: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            maximize=maximize,
            **others,
        )


class DistAdam(BaseOptimizer):
    """torch.optim.Adam, with its state on shards; without amsgrad.

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, others: as
            `DistNadam`.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = DistAdam([weight], lr=0.1)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> [round(value, 4) for value in weight.tolist()]
    [0.9, 0.9]
    """

    _formula = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **others: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **others)


class DistAdamW(DistAdam):
    """torch.optim.AdamW, with its state on shards: `DistAdam` with decoupled weight decay.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = DistAdamW([weight], lr=0.1, weight_decay=0.5)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> [round(value, 4) for value in weight.tolist()]
    [0.85, 0.85]
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            **{"decoupled_weight_decay": True, **others},
        )
