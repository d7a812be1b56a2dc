"""The shards of one torch optimizer: made at its first step, pushed to and read from. What torch
means is elsewhere: here are trees by name.

Rank 0 makes them and ends them. What ranks change outside of a step they agree on first; rank 0
then gives it to the shards, while the others wait to see it.
"""

import atexit
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distnadam.client.agreement import Agreement
from distnadam.client.user_state import params_from
from distnadam.config import Options, Topology
from distnadam.errors import ConfigError, StepTimeout, StructureError
from distnadam.frontends import meeting
from distnadam.frontends.changes import is_rounded, with_changed
from distnadam.frontends.ranks import Place
from distnadam.hyperparameters import Formula, PullDtype
from distnadam.nadam.step_scalars import Clock
from distnadam.optimizer import DistNadam
from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout
from distnadam.torch.device_copies import device_of
from distnadam.torch.groups import Settings
from distnadam.worker import Worker

_POLL_S = 0.02


class Shards:
    """The optimizer and this process's worker, once they are there.

    Attributes:
        fixed: the settings of the formula, once the shards are built with them.

    Args:
        formula: what is computed.
        place: this process's rank.
        topology: num_shards, replicas, backend and name.
        options: rare settings.
        pull_dtype: to which parameters are rounded that ranks get; None: they are not.

    Raises:
        ConfigError: they are out of their range, or several ranks cannot find each other by them.
    """

    def __init__(
        self,
        formula: Formula,
        place: Place,
        topology: Mapping[str, Any],
        options: Options,
        pull_dtype: PullDtype | None = None,
    ) -> None:
        self.formula = formula
        self.pull_dtype = pull_dtype
        self.place = place
        self._topology = Topology(num_workers=place.num_workers, **topology)
        if self.several and self._topology.backend == "local":
            raise ConfigError(
                f"backend='local' is this process alone, and there are {place.num_workers} ranks: "
                "leave backend out"
            )
        self._is_named = self._topology.name is not None
        self._name = meeting.name_for(place, self._topology.name)
        self._options = meeting.lasting(options, is_named=self._is_named)
        self._optimizer: DistNadam | None = None
        self._worker: Worker | None = None
        self._agreement = Agreement()
        self.fixed: dict[str, Any] = {}
        self._own: Any = None  # what the settings of the groups are on the shards
        self._is_closed = False
        self._process = os.getpid()

    @property
    def several(self) -> bool:
        """Whether other ranks push too."""
        return self.place.num_workers > 1

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

    @property
    def layout(self) -> Layout:
        """The model's."""
        return self.optimizer.shards.layout

    def build(self, params: Mapping[str, torch.Tensor], settings: Settings) -> None:
        """Start the shards with these parameters, by name, or attach to those of rank 0.

        Raises:
            ConfigError, StructureError: rank 0's have another formula, or other tensors.
            StepTimeout: rank 0 does not build them.
        """
        if self.place.rank:
            assert self._name is not None
            found = meeting.attach(self.place, self._name, self._options.step_timeout_s)
            self._join(found, params, settings)
            return
        beta_1, beta_2 = settings.betas
        topology = self._topology.to_dict() | {"name": self._name}
        self.fixed = settings.formula
        meeting.prepare(self.place, self._options)
        optimizer = DistNadam(
            formula=self.formula,
            clocks="tensor",
            beta_1=beta_1,
            beta_2=beta_2,
            options=self._options,
            pull_dtype="bfloat16" if _is_bfloat16(params) else self.pull_dtype,
            **settings.formula,
            **topology,
            **settings.config(),
        )
        self._optimizer = optimizer.build(dict(params))
        self._own = settings.own
        self._worker = optimizer.worker(0)
        meeting.close_at_end(self.place, self.close, is_named=self._is_named)
        if self.several and self._name is not None:
            meeting.announce(self.place, self._name)

    def rejoin(self, params: Mapping[str, Any], settings: Settings) -> bool:
        """Take this rank over where the ranks of a name that was given train already; return
        whether they do.
        """
        if not (self.several and self._is_named and self._name is not None):
            return False
        found = meeting.running(self._name)
        if found is None or found.round == 0:
            return False
        self._join(found, params, settings)
        return True

    def _join(self, found: DistNadam, params: Mapping[str, Any], settings: Settings) -> None:
        config = found.get_config()
        own: dict[str, Any] = {"formula": self.formula, "clocks": "tensor", **settings.formula}
        if not _is_all_bfloat16(params):  # else it changes no number, and rank 0's device decides
            own["pull_dtype"] = self.pull_dtype
        for key, value in own.items():
            if (theirs := config.get(key)) != value:
                raise ConfigError(
                    f"rank {self.place.rank}: {key}={value!r}, and rank 0 has {theirs!r}"
                )
        if config["num_workers"] != self.place.num_workers:
            raise ConfigError(
                f"rank {self.place.rank}: num_workers={self.place.num_workers!r}, and {self._name} "
                f"has {config['num_workers']!r}"
            )
        known = {t.path: (t.shape, t.dtype) for t in found.shards.layout.tensors}
        ours = {t.path: (t.shape, t.dtype) for t in Layout.of(dict(params)).tensors}
        for path in {**known, **ours}:
            if known.get(path) != ours.get(path):
                raise StructureError(
                    f"rank {self.place.rank}: {path!r} is {ours.get(path, 'not there')}, and rank "
                    f"0's is {known.get(path, 'not there')}"
                )
        self._optimizer = found
        self.fixed = settings.formula
        same = all(config.get(key) == value for key, value in settings.plain_config().items())
        self._own = settings.own if same else None
        self._worker = found.worker(self.place.rank)
        meeting.close_at_end(self.place, self.close, is_named=self._is_named)

    def gradients(self, dtype: str | None) -> dict[str, Any]:
        """Return the views that gradients are written into, by name."""
        views: dict[str, Any] = self.worker.gradients(dtype)
        return views

    def share_parameters(self) -> Sequence[Array]:
        """Have the parameters be stepped where they lie, and by whoever writes there changed too;
        return their memory, which is none where shards are in other processes.
        """
        return self.optimizer.shards.backend.transport.share_parameters()

    def move_parameters(self) -> None:
        """Leave that memory as it is, and step copies of the parameters from now on."""
        self.optimizer.shards.backend.transport.move_parameters()

    @property
    def are_far(self) -> bool:
        """Whether shards of other hosts get pieces of a gradient before it is pushed."""
        return bool(self.worker.session.channel.relayed)

    def memory(self, *, gradients: bool) -> list[Array]:
        """Return both buffers of the parameters if they are shared, and what gradients are pushed
        from.
        """
        channel = self.worker.session.channel
        flats = (*(channel.parameters or ()), *((channel.gradients,) if gradients else ()))
        return [array for flat in flats for array in flat.values()]

    def pull(self) -> dict[str, Any]:
        """Return the present parameters by name, which are the worker's views."""
        parameters: dict[str, Any] = self.worker.pull()
        return parameters

    def step(
        self, settings: Settings, gradients: Any = None, *, found_inf: bool = False
    ) -> dict[str, Any]:
        """Push gradients by name, or what lies in the views, and return the parameters after the
        round.
        """
        parameters: dict[str, Any] = self.worker.step(
            gradients, found_inf=found_inf, lr=settings.lr, betas=settings.betas
        )
        return parameters

    def read(self) -> tuple[Clock, dict[str, Flat]]:
        """Return the clock and copies of the moments at one round, and of masters that the model
        has rounded.
        """
        masters = ("params",) if is_rounded(self.layout) else ()
        return self.optimizer.shards.read(("m", "v", *masters))

    def differ(self, settings: Settings) -> bool:
        """Whether the shards have other epsilons or weight decays."""
        return bool(settings.own != self._own)

    def replace(
        self,
        what: str,
        settings: Settings,
        params: Mapping[str, Any] | None,
        changed: frozenset[str],
        state_of: tuple[Clock, Mapping[str, Flat]] | None,
    ) -> None:
        """Have all ranks agree on a change, and give it to the shards.

        Args:
            what: names all of it, with digests of the bits.
            settings: what the groups have.
            params: the parameters by name; None: as they are.
            changed: which of them are others than the shards have.
            state_of: the clock and the moments; None: as they are.

        Raises:
            RanksDisagree: ranks have changed different things; nothing was changed.
        """
        clock, moments = state_of if state_of is not None else (None, {})
        arrays = dict(moments)
        if params is not None:
            arrays["params"] = params_from(self.layout, dict(params))
        epoch = self._agreement.reach(self.worker.session, what) if self.several else 0
        if self.place.rank:
            self._await(settings, epoch if arrays else None)
        else:
            if self.differ(settings):
                self.optimizer.set_config(**settings.config())
            if params is not None:
                shards = self.optimizer.shards
                arrays["params"] = with_changed(shards, arrays["params"], changed)
            if arrays:
                self.optimizer.shards.fill(arrays, clock)
        self._own = settings.own
        self._agreement.carried_out()

    def _await(self, settings: Settings, epoch: int | None) -> None:
        """Wait until rank 0 has made a change.

        Args:
            settings: what the groups have after it.
            epoch: the one before it; None if no arrays are replaced.
        """
        began = time.monotonic()
        expected = settings.plain_config()
        while True:
            now = self.optimizer.shards.describe()
            config = self.optimizer.get_config()
            is_set = all(config.get(key) == value for key, value in expected.items())
            if is_set and (epoch is None or now.epoch > epoch):
                return
            if time.monotonic() - began > self._options.step_timeout_s:
                raise StepTimeout(
                    f"rank {self.place.rank}: rank 0 has not made the change that all ranks agreed "
                    f"on in {self._options.step_timeout_s:g} s"
                )
            time.sleep(_POLL_S)

    def leave(self) -> None:
        """Leave the rounds; what rank 0 has made ends once the others have left, or with the
        process.
        """
        if self._may_close:
            self.worker.close()
            if not self.several or meeting.others_have_left(self.optimizer, self.place.rank):
                self.close()

    def close(self) -> None:
        """Leave, and end the shards if this is rank 0, once the other ranks have left."""
        if not self._may_close:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        self.worker.close()
        if self.several and not self.place.rank and self._name is not None:
            meeting.end(self.place, self._name, self.optimizer)
        self.optimizer.close()

    @property
    def _may_close(self) -> bool:
        """Whether there is something to close, in the process that has made it: a forked child,
        such as a data loader's, holds a copy.
        """
        return self.is_built and not self._is_closed and self._process == os.getpid()


def _is_bfloat16(params: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model is on a GPU, and all its tensors that workers may see in bfloat16 are of it,
    so that half the bytes cross, and none is rounded that is not rounded anyway.
    """
    return _is_all_bfloat16(params) and device_of(list(params.values())) is not None


def _is_all_bfloat16(params: Mapping[str, torch.Tensor]) -> bool:
    return {tensor.dtype for tensor in params.values()} - {torch.float64} == {torch.bfloat16}
