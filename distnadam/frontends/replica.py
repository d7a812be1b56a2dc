"""One rank's copy of a model, as a framework holds it, and the worker that steps it.

The framework owns its parameters: what it has changed between two steps is taken over. It knows
named NumPy arrays and one optimizer, no framework.
"""

import atexit
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from distnadam.client.agreement import Agreement
from distnadam.client.user_state import params_from
from distnadam.config import Options
from distnadam.errors import (
    ConfigError,
    LifecycleError,
    NonFiniteGradient,
    RanksDisagree,
    Rewound,
    StepTimeout,
    StructureError,
)
from distnadam.frontends import meeting
from distnadam.frontends.changes import differing, digest_bytes, in_words, same_bits, with_changed
from distnadam.frontends.ranks import find_place
from distnadam.groups import Group
from distnadam.interop import OptimizerState
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.optimizer import DistNadam
from distnadam.shield import shield
from distnadam.tensors.arrays import Array
from distnadam.worker import Worker

Named = Mapping[str, Array]
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What an optimizer holds beside the parameters: its clock, and arrays by tensor.

    Attributes:
        iterations: steps applied.
        m_schedule: the product of the momentum coefficients so far.
        m, v, ema: the moments and the average of the parameters by name; `ema` is {} where none is
            kept.
        clocks: how far each tensor is, by name; {} where all are where the optimizer is.
    """

    iterations: int
    m_schedule: float
    m: Named
    v: Named
    ema: Named
    clocks: Mapping[str, TensorClock] = field(default_factory=dict)

    @classmethod
    def of(cls, state: OptimizerState) -> "Slots":
        """Return those of a loaded checkpoint."""
        m, v = (dict(zip(state.names, slot, strict=True)) for slot in (state.m, state.v))
        ema = {} if state.ema is None else dict(zip(state.names, state.ema, strict=True))
        return cls.at(state.clock, m, v, ema)

    @classmethod
    def at(cls, clock: Clock, m: Named, v: Named, ema: Named) -> "Slots":
        """Return those of moments in a layout's order, and its clock."""
        clocks = {name: clock.of_tensor(index) for index, name in enumerate(m)}
        if set(clocks.values()) == {TensorClock(clock.iterations, clock.m_schedule)}:
            clocks = {}
        return cls(
            iterations=clock.iterations,
            m_schedule=clock.m_schedule,
            m=m,
            v=v,
            ema=ema,
            clocks=clocks,
        )

    @classmethod
    def zero(cls, params: Named, *, use_ema: bool) -> "Slots":
        """Return those of an optimizer that has not stepped yet."""
        still = {name: np.zeros_like(array) for name, array in params.items()}
        ema = dict(params) if use_ema else {}
        return cls(iterations=0, m_schedule=1.0, m=still, v=still, ema=ema)

    def renamed(self, names: Mapping[str, str]) -> "Slots":
        """Return the same of tensors that are called otherwise."""
        kept: dict[str, Any] = {
            what: {names[name]: value for name, value in getattr(self, what).items()}
            for what in ("m", "v", "ema", "clocks")
        }
        return replace(self, **kept)


class Replica:
    """One rank's copy of a model.

    Its shards start at the first step: rank 0 makes them, the other ranks attach to them.

    Args:
        arguments: `DistNadam`'s, of plain hyper-parameters and topology, but the number of workers.
        rank, num_workers: this process's rank and how many there are; None: `find_place` finds it.

    Raises:
        ConfigError: naming the argument that is out of its range, or the rank; or there are several
            workers and no name by which they find each other.
    """

    def __init__(
        self, arguments: Mapping[str, Any], rank: int | None = None, num_workers: int | None = None
    ) -> None:
        self._place = place = find_place(rank, num_workers)
        self.rank, self.num_workers = place.rank, place.num_workers
        self._arguments = {**arguments, "num_workers": place.num_workers}
        plan = DistNadam(**self._arguments).get_config()
        if place.num_workers > 1 and plan["name"] is None and place.run is None:
            raise ConfigError(
                f"num_workers={self.num_workers} needs a name of the cluster (cluster_name; in JAX "
                "name), by which the ranks find each other"
            )
        self._is_named = plan["name"] is not None
        self._name = meeting.name_for(place, plan["name"])
        options = Options.of(plan["options"])
        self._options = meeting.lasting(options, is_named=self._is_named)
        self._arguments |= {"name": self._name, "options": self._options}
        self.use_ema: bool = plan["use_ema"]
        self._joined: tuple[DistNadam, Worker] | None = None
        self._slots: Slots | None = None
        self._agreement = Agreement()
        self._left: Named | None = None  # in the framework, by a step that was cut
        self._is_closed = False
        self._process: int | None = None

    @property
    def is_started(self) -> bool:
        """Whether there are shards."""
        return self._joined is not None

    @property
    def optimizer(self) -> DistNadam:
        """The cluster's handle; raise LifecycleError before the first step."""
        return self._running()[0]

    def _running(self) -> tuple[DistNadam, Worker]:
        if self._joined is None:
            raise LifecycleError("there are no shards before the first step")
        return self._joined

    def start(
        self, params: Named, *, groups: Sequence[Group] = (), lr: float | None = None
    ) -> None:
        """Make the shards of a model, or connect to them.

        Args:
            params: the model, by name.
            groups: tensors with settings of their own.
            lr: the learning rate that `get_config` and checkpoints say; None: as it was given.

        Raises:
            StructureError: this rank's model is not rank 0's.
            StepTimeout: rank 0 does not make the shards.
        """
        if self.rank == 0:
            rate = {} if lr is None else {"lr": lr}
            meeting.prepare(self._place, self._options)
            optimizer = DistNadam(**self._arguments | rate, groups=groups).build(params)
        else:
            assert self._name is not None
            optimizer = meeting.attach(self._place, self._name, self._options.step_timeout_s)
        try:
            worker = optimizer.worker(self.rank)
            if self.rank == 0:
                if self._slots is not None:
                    _fill(optimizer, self._slots)
                worker.pull()
            else:
                _require_same(worker.pull(), params, self.rank)
        except BaseException:
            optimizer.close()
            raise
        self._joined = optimizer, worker
        if self._name is not None:
            self._process = os.getpid()
            meeting.close_at_end(self._place, self.close, is_named=self._is_named)
            if self.rank == 0:
                meeting.announce(self._place, self._name)
        self._slots = None

    def step(
        self,
        params: Named,
        gradients: Mapping[str, Any] | None,
        take: Callable[[Named], None],
        *,
        lr: float | None = None,
        found_inf: bool = False,
    ) -> None:
        """Push gradients, wait for the round, and have the framework take the new parameters.

        What a step has pushed that a Ctrl-C or a timeout ends counts once; the next one completes
        it, before its own gradients. What the framework still has of before such a step, or of
        before `Rewound`, is no change of the user's.

        Args:
            params: what the framework holds now; what differs from what the last step returned is
                taken over first.
            gradients: by name; they may be reused at once. None with `found_inf`.
            take: gets the new parameters, read-only arrays that are good until the next call; or,
                before `Rewound` is raised, those that the shards went back to. No signal cuts it.
            lr: the learning rate of this step, equal on all ranks; None: the optimizer's.
            found_inf: see `Worker.push`.

        Raises:
            RanksDisagree: ranks have changed different things; nothing was changed.
            StructureError: a gradient is none of the model's.
            And as `Worker.step`.
        """
        optimizer, worker = self._running()
        is_given = False
        try:
            self._take_over(optimizer, worker, self._without_left(worker, params))
            is_given = True
            stepped: Named = worker.step(gradients, found_inf=found_inf, lr=lr)
            with shield:
                take(stepped)
                self._left = None
        except (NonFiniteGradient, RanksDisagree):  # no shard has moved
            raise
        except BaseException as error:
            is_rewound = isinstance(error, Rewound)
            if is_given or is_rewound:
                with shield:
                    self._left = {name: np.array(array) for name, array in params.items()}
            if is_rewound:
                stepped = worker.pull()
                with shield:
                    take(stepped)
            raise

    def _without_left(self, worker: Worker, params: Named) -> Named:
        """Return what the framework holds, and for what a step that was cut has left there the
        shards' own, once the push in flight is completed.
        """
        if (left := self._left) is None:
            return params
        own: Named = worker.pull()
        return {
            name: own[name] if same_bits(left[name], np.asarray(array)) else array
            for name, array in params.items()
        }

    @property
    def found_inf(self) -> bool:
        """Whether the last round was skipped, since a rank's gradients overflowed."""
        return self._running()[1].found_inf

    @property
    def loss_scale(self) -> float:
        """What the coming step's loss is to be multiplied by; 1 if the shards keep no scale."""
        return self._running()[1].loss_scale

    def handed_out(self) -> Named:
        """Return the parameters as the last step returned them."""
        held: Named = self._running()[1].parameters()
        return held

    def slots(self, params: Named) -> Slots:
        """Return copies of what the shards hold; of a model without shards what they would."""
        if self._joined is None:
            return self._slots or Slots.zero(params, use_ema=self.use_ema)
        optimizer = self._joined[0]
        layout = optimizer.shards.layout
        clock, flat = optimizer.shards.read(("m", "v"))
        m, v = (dict(zip(_names_of(optimizer), layout.views(flat[s]), strict=True)) for s in "mv")
        return Slots.at(clock, m, v, optimizer.get_ema_params() if self.use_ema else {})

    def load(self, slots: Slots) -> None:
        """Have the shards hold other slots, from now or from their start on; rank 0's count."""
        if self._joined is None:
            self._slots = slots
        elif self.rank == 0:
            _fill(self._joined[0], slots)
            self._joined[1].pull()

    def close(self) -> None:
        """Leave; rank 0 ends the shards that it made, once the others have left."""
        is_forked = self._process not in (None, os.getpid())  # its end is not the parent's
        if self._joined is None or self._is_closed or is_forked:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        optimizer, worker = self._joined
        worker.close()
        if self.rank == 0 and self._name is not None:
            meeting.end(self._place, self._name, optimizer)
        optimizer.close()

    def _take_over(self, optimizer: DistNadam, worker: Worker, params: Named) -> None:
        """Have the shards hold what the framework has changed, on all ranks alike."""
        changed = differing(worker.parameters(), params)
        if not changed:
            return
        shards, epoch = optimizer.shards, 0
        whole = params_from(shards.layout, dict(params))
        if self.num_workers > 1:
            bits = [digest_bytes(np.asarray(params[name]).tobytes()) for name in changed]
            said = in_words(list(zip(changed, bits, strict=True)))
            epoch = self._agreement.reach(worker.session, said)
        if self.rank == 0:
            shards.fill({"params": with_changed(shards, whole, frozenset(changed))})
        else:
            self._await_epoch_after(epoch, optimizer)
        self._agreement.carried_out()
        worker.pull()

    def _await_epoch_after(self, epoch: int, optimizer: DistNadam) -> None:
        """Wait until rank 0 has made the change that all ranks have agreed on."""
        until = time.monotonic() + optimizer.options.step_timeout_s
        while optimizer.shards.describe().epoch <= epoch:
            if time.monotonic() > until:
                raise StepTimeout(
                    f"rank {self.rank}: rank 0 has not made the change that all ranks agreed on in "
                    f"{optimizer.options.step_timeout_s:g} s"
                )
            time.sleep(_POLL_S)


def _names_of(optimizer: DistNadam) -> list[str]:
    return [tensor.path for tensor in optimizer.shards.layout.tensors]


def _fill(optimizer: DistNadam, slots: Slots) -> None:
    names = _names_of(optimizer)
    for what, named in (("m", slots.m), ("v", slots.v)):
        if set(named) != set(names):
            odd = sorted(set(named) ^ set(names))
            raise StructureError(
                f"{what}: expected the {len(names)} tensors of this model, got {len(named)}: "
                f"{', '.join(map(repr, odd[:3]))} in one alone"
            )
    ms, vs = ([named[name] for name in names] for named in (slots.m, slots.v))
    optimizer.set_weights([slots.iterations, slots.m_schedule, *ms, *vs])
    if slots.clocks:
        shards = optimizer.shards
        own = TensorClock(slots.iterations, slots.m_schedule)
        clocks = TensorClocks.of(slots.clocks.get(name, own) for name in names)
        shards.fill(shards.read(("m", "v"))[1], Clock(*own, clocks))
    if slots.ema:
        optimizer.set_ema_params(slots.ema)


def distinct(names: Sequence[str]) -> list[str]:
    """Return names without stars, which patterns have, each once: repeats get a number.

    >>> distinct(["w", "w", "a/*"])
    ['w', 'w_1', 'a/_']
    """
    found: dict[str, None] = {}
    for name in names:
        plain = unused = name.replace("*", "_")
        count = 0
        while unused in found:
            count += 1
            unused = f"{plain}_{count}"
        found[unused] = None
    return list(found)


def _require_same(held: Named, params: Named, rank: int) -> None:
    if list(held) != list(params):
        odd = sorted(set(held) ^ set(params)) or ["their order"]
        raise StructureError(
            f"rank {rank}: this model is not rank 0's: {', '.join(map(repr, odd[:3]))} differ"
        )
    if changed := differing(held, params):
        raise StructureError(
            f"rank {rank}: {changed[0]!r} does not begin as on rank 0: initialise the model from "
            "one seed on all ranks (keras.utils.set_random_seed, torch.manual_seed, "
            "jax.random.key), or load one file"
        )
