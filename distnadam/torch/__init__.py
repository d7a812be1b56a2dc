"""The optimizers as torch's users know them: `torch.optim.Optimizer`s whose state and step are on
shards.

Two lines of an ordinary loop change, the import and the class; loss, `backward`, `step`,
`zero_grad`, schedulers, hooks and `state_dict` stay as they are:

>>> import torch, distnadam
>>> model = torch.nn.Linear(2, 1)
>>> optimizer = distnadam.torch.DistNadamW(model.named_parameters(), lr=0.01)
>>> model(torch.ones(1, 2)).sum().backward()
>>> optimizer.step()
>>> optimizer.zero_grad()
>>> int(optimizer.state_dict()["state"][0]["step"])
1

Importing `distnadam` imports no torch; this module does, when it is first used.
"""

from distnadam.torch.grad_scaler import GradScaler
from distnadam.torch.optimizer import DistAdam, DistAdamW, DistNadam, DistNadamW

__all__ = ["DistAdam", "DistAdamW", "DistNadam", "DistNadamW", "GradScaler"]
