"""The shards of one torch optimizer: made at its first step, pushed to and read from. What torch
means is elsewhere: here are trees by name.
"""

from collections.abc import Mapping
from typing import Any

from distnadam.config import Options, Topology
from distnadam.frontends.ranks import Place
from distnadam.hyperparameters import Formula
from distnadam.nadam.step_scalars import Clock
from distnadam.optimizer import DistNadam
from distnadam.tensors.arrays import Flat
from distnadam.torch.groups import Settings
from distnadam.worker import Worker


class Shards:
    """The optimizer and this process's worker, once they are there.

    Args:
        formula: what is computed.
        fixed: the settings of the formula, which do not change.
        place: this process's rank.
        topology: num_shards, replicas, backend and name.
        options: rare settings.
    """

    def __init__(
        self,
        formula: Formula,
        fixed: Mapping[str, Any],
        place: Place,
        topology: Mapping[str, Any],
        options: Options | None,
    ) -> None:
        self.formula = formula
        self.place = place
        self._fixed = fixed
        self._topology = Topology(num_workers=place.num_workers, **topology).to_dict()
        self._options = options
        self._optimizer: DistNadam | None = None
        self._worker: Worker | None = None
        self._decay: Any = None

    @property
    def is_built(self) -> bool:
        """Whether the shards are there."""
        return self._worker is not None

    @property
    def optimizer(self) -> DistNadam:
        """The optimizer, which is built."""
        assert self._optimizer is not None
        return self._optimizer

    @property
    def worker(self) -> Worker:
        """This process's worker."""
        assert self._worker is not None
        return self._worker

    def build(self, params: Mapping[str, Any], settings: Settings) -> None:
        """Start the shards with these parameters, by name, and what the groups have."""
        beta_1, beta_2 = settings.betas
        optimizer = DistNadam(
            formula=self.formula,
            beta_1=beta_1,
            beta_2=beta_2,
            options=self._options,
            **self._fixed,
            **self._topology,
            **settings.config(),
        )
        self._optimizer = optimizer.build(dict(params))
        self._decay = settings.decay
        self._worker = optimizer.worker(self.place.rank)

    def gradients(self, dtype: str | None) -> dict[str, Any]:
        """Return the views that gradients are written into, by name."""
        views: dict[str, Any] = self.worker.gradients(dtype)
        return views

    def pull(self) -> dict[str, Any]:
        """Return the present parameters by name, which are the worker's views."""
        parameters: dict[str, Any] = self.worker.pull()
        return parameters

    def configure(self, settings: Settings) -> None:
        """Have what the groups have of their own from the next step on."""
        if settings.decay != self._decay:
            self.optimizer.set_config(**settings.config())
            self._decay = settings.decay

    def step(self, settings: Settings, *, found_inf: bool = False) -> dict[str, Any]:
        """Push what lies in the views, and return the parameters after the round."""
        parameters: dict[str, Any] = self.worker.step(
            found_inf=found_inf, lr=settings.lr, betas=settings.betas
        )
        return parameters

    def read(self) -> tuple[Clock, dict[str, Flat]]:
        """Return the clock and copies of the moments at one round."""
        return self.optimizer.shards.read(("m", "v"))

    def replace(
        self,
        params: Mapping[str, Any] | None,
        clock: Clock | None = None,
        moments: Mapping[str, Flat] | None = None,
    ) -> None:
        """Replace parameters, moments and clock, each where it is given, between two rounds."""
        if params is not None:
            self.optimizer.set_params(dict(params))
        if moments is not None:
            self.optimizer.shards.fill(moments, clock)

    def close(self) -> None:
        """End the shards if this process made them."""
        if self._worker is not None:
            self._worker.close()
        if self._optimizer is not None:
            self._optimizer.close()
