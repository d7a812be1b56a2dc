"""What a run must come to, computed by one shard in one process from the record of whose pushes
counted in which round.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import ScaleState
from distnadam.nadam.norms import tensor_square_sums
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import (
    Join,
    PartialNorms,
    Pause,
    Push,
    ShardSpec,
    Step,
    StepNorms,
    TotalNorms,
)
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.supervisor_messages import Reconfigure, ShardControlState
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.ledger import DIRECT
from distnadam.tensors.layout import Layout

Array = np.ndarray[Any, np.dtype[np.float32]]
History = tuple[tuple[tuple[int, int], ...], ...]
"""For each round, who counted: (rank, incarnation), in rank order."""


@dataclass(frozen=True)
class State:
    """All that a round leaves behind."""

    params: Array
    m: Array
    v: Array
    clock: Clock
    skipped: int
    ema: Array | None = None
    loss_scale: ScaleState | None = None


class OneProcess:
    """The model: `gradient(round, rank, incarnation, params)` is None where it is not finite.

    Args:
        layout: one float32 space.
        config: the hyper-parameters.
        initial: the first parameters.
        gradient: what each worker pushes, given the parameters as workers see them.
        settings: what else each worker says of a round.
    """

    def __init__(
        self,
        layout: Layout,
        config: NadamConfig,
        initial: Array,
        gradient: Callable[[int, int, int, Array], Array | None],
        settings: Callable[[int, int, int], RoundSettings] = lambda *_: ORDINARY,
    ) -> None:
        self._layout, self._gradient = layout, gradient
        self._settings = settings
        zeros = np.zeros_like(initial)
        average = initial if config.use_ema else None
        scale = None if config.loss_scale is None else config.loss_scale.first
        first = State(initial, zeros, zeros, Clock(), 0, average, scale)
        self._known: dict[tuple[History, tuple[int, ...]], State] = {((), ()): first}
        self.configs = [config]

    def after(self, history: History, configs: tuple[int, ...] = ()) -> State:
        """Return the state that these rounds lead to.

        Args:
            history: the rounds.
            configs: for the first so many of them, which of `configs` each was stepped with; the
                others with the first.
        """
        if (history, configs) not in self._known:
            which = configs[-1] if len(configs) == len(history) else 0
            before = self.after(history[:-1], configs[: len(history) - 1])
            after = self._next(before, len(history), history[-1], self.configs[which])
            self._known[history, configs] = after
        return self._known[history, configs]

    def _next(
        self,
        before: State,
        number: int,
        counted: tuple[tuple[int, int], ...],
        config: NadamConfig,
    ) -> State:
        ranks = tuple(rank for rank, _ in counted)
        options = Options(on_nonfinite="skip", kernel="numpy")
        spec = ShardSpec(
            index=0,
            num_shards=1,
            num_workers=max(0, *ranks) + 1,
            replicas=0,
            name=None,
            config=config,
            options=options,
            layout=self._layout,
            ranges=self._layout.cuts(1)[0],
        )
        host = ShardHost(spec)
        control_state = ShardControlState(
            epoch=0,
            round=number - 1,
            skipped=before.skipped,
            clock=before.clock,
            loss_scale=before.loss_scale,
            lr=0.0,
            active=0,
            outcome="applied",
            rejection=None,
            ledger={"runs": [], "newest": []},
        )
        names = config.state_arrays
        arrays = {name: {"float32": getattr(before, name)} for name in names}
        outside = ranks == (DIRECT,)
        host.take_over(
            control_state, arrays, Reconfigure(epoch=1, schedule=((1, (0,) if outside else ranks),))
        )
        host.send(Pause("")) if outside else [
            host.send(Join(rank=rank, incarnation=1)).result(0) for rank in ranks
        ]
        for rank, incarnation in counted:
            seen = before.params.astype(self._layout.pull_dtypes["float32"])
            gradient = self._gradient(number, rank, incarnation, seen)
            flat = None if gradient is None else {"float32": gradient}
            settings = self._settings(number, rank, incarnation)
            if flat is None and config.loss_scale is not None:
                settings = replace(settings, found_inf=True)
            if settings.found_inf:
                flat = None
            rejection = "not finite" if flat is None else None
            answer = host.send(
                Step(token="", incarnation=1, round=number, gradients=flat, rejection=rejection)
                if outside
                else Push(
                    epoch=1,
                    rank=rank,
                    incarnation=1,
                    round=number,
                    gradients=flat,
                    rejection=rejection,
                    settings=settings,
                )
            )
        measured = answer.result(0)
        if isinstance(measured, PartialNorms):
            totals = tensor_square_sums(len(self._layout.tensors), [measured.sums])
            host.send(
                StepNorms("", totals)
                if outside
                else TotalNorms(
                    epoch=1, rank=ranks[0], incarnation=1, round=number, square_sums=totals
                )
            ).result(0)
        return state_of(host)


def state_of(host: ShardHost) -> State:
    """Copy a host's state, whatever it is doing."""
    shard = host.shard
    arrays = {name: flat["float32"].copy() for name, flat in shard.state.arrays().items()}
    now = shard.progress
    return State(**arrays, clock=replace(now.clock), skipped=now.skipped, loss_scale=now.loss_scale)


def history_of(ledger: dict[str, Any], decided: int) -> History:
    """Return whose pushes a ledger counted in each round; a rank that counted twice in one is there
    twice.
    """
    rounds: list[list[tuple[int, int]]] = [[] for _ in range(decided)]
    for rank, incarnation, first, last in ledger["runs"]:
        for number in range(first, last + 1):
            rounds[number - 1].append((rank, incarnation))
    return tuple(tuple(sorted(counted)) for counted in rounds)
