"""A shard's standby, which follows it round by round and can become the shard.

It maps the memory of its primary's state, or has a copy that it steps from the primary's mean
gradients: Nadam's step is deterministic, so both hold the same bits. It knows neither sockets nor
Ray: records are brought to it.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence

from distnadam.errors import IllegalMessage, ShardsDisagree
from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import ScaleState
from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import in_order
from distnadam.nadam.parts import Arranger
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.nadam.stepper import RangeStep, Slots
from distnadam.protocol.messages import PushNote, ShardSpec
from distnadam.protocol.round_settings import absent_in
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Reconfigure,
    Record,
    ReplicatedConfig,
    ReplicatedJoin,
    ReplicatedRound,
    ShardControlState,
)
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.ledger import Ledger
from distnadam.tensors.arrays import Flat


class Standby:
    """One standby.

    Args:
        spec: the shard's spec.
        threads: threads of its kernel.
    """

    def __init__(self, spec: ShardSpec, threads: int = 1) -> None:
        self._spec = spec
        self._steppers = {
            space: make_stepper(spec.options.kernel, space, threads) for space in spec.ranges
        }
        self._arranger = Arranger(spec.layout, spec.ranges, self._steppers)
        self._arrays: dict[str, Flat] = {}
        self._states: Sequence[dict[str, Flat]] = ()  # mapped, by the index of the current buffer
        self._slots: dict[str, Slots] = {}
        self._control_state: ShardControlState | None = None  # but for the rounds followed since
        self._followed: ReplicatedRound | None = None  # the last of them
        self._applied: ReplicatedRound | None = None  # the last of them that stepped
        self._counted: dict[int, PushNote] = {}
        self._scale: ScaleState | None = None
        self._ledger = Ledger()
        self._lock = threading.RLock()

    def take_arrays(self, arrays: dict[str, Flat]) -> None:
        """Take a copy of the primary's arrays by name, to be stepped in place."""
        with self._lock:
            self._arrays, self._states = arrays, ()
            self._control_state = None  # until `begin` says which round they are of

    def map_states(self, states: Sequence[dict[str, Flat]]) -> None:
        """Take the memory that the primary keeps its state in: its arrays by name, by the index of
        the current buffer, of which the primary writes those that its last record does not name.
        """
        with self._lock:
            self._arrays, self._states = {}, states
            self._control_state = None

    def begin(self, control_state: ShardControlState, config: NadamConfig) -> None:
        """Take the control state that the arrays belong to, and the current hyper-parameters."""
        with self._lock:
            if not (self._arrays or self._states):
                raise IllegalMessage(
                    f"standby of shard {self._spec.index}: was detached before it had its state"
                )
            self._spec = dataclasses.replace(self._spec, config=config)
            self._slots = {
                space: Slots(
                    p=self._arrays["params"][space],
                    m=self._arrays["m"][space],
                    v=self._arrays["v"][space],
                    ema=self._arrays["ema"][space] if config.use_ema else None,
                )
                for space in (self._steppers if self._arrays else ())
            }
            self._stand_at(control_state)
            self._ledger = Ledger.from_dict(control_state.ledger)

    def apply(self, record: Record, mean: Flat | None) -> None:
        """Follow the primary by one record; `mean` is the round's mean gradient, scaled and
        clipped, None where the primary's memory is mapped.

        A standby that is detached, or could not follow, has no state any more: its primary goes on
        without it.

        Raises:
            IllegalMessage: it is not the record that comes next.
            ShardsDisagree: the learning-rate function gave this process another rate than the
                primary.
        """
        with self._lock:
            now = self._control_state
            if isinstance(record, ReplicatedRound) and now is not None:
                self._control_state = None  # unless it can be followed
                self._follow(now, record, mean)
                self._control_state = now
                return
            now = self._present
            self._control_state = None
            if isinstance(record, DetachStandby):
                self._forget_arrays()
            elif now is None or isinstance(record, ReplicatedRound):
                raise IllegalMessage(
                    f"standby of shard {self._spec.index}: has no state, got {record}"
                )
            else:
                self._stand_at(self._after(record, now))

    def promote(
        self, reconfigure: Reconfigure, make_host: Callable[[ShardSpec], ShardHost]
    ) -> tuple[ShardHost, ShardControlState]:
        """Return a host that stands, as the primary, where this standby has got to; raise
        IllegalMessage where it was never filled.
        """
        with self._lock:
            control_state = self.control_state
            if control_state is None or not self.arrays:
                raise IllegalMessage(f"standby of shard {self._spec.index}: has no state yet")
            host = make_host(self._spec)
            host.take_over(control_state, self.arrays, reconfigure)
            for stepper in self._steppers.values():
                stepper.close()
            self._forget_arrays()
            self._control_state = None
            return host, control_state

    @property
    def arrays(self) -> dict[str, Flat]:
        """The standby's arrays by name; empty if it has none."""
        with self._lock:
            if not self._states:
                return self._arrays
            now = self._present
            return {} if now is None else self._states[now.active]

    @property
    def control_state(self) -> ShardControlState | None:
        """Where the standby stands; None if it has no state that could take over."""
        with self._lock:
            now = self._present
            return None if now is None else dataclasses.replace(now, ledger=self._ledger.to_dict())

    @property
    def reached(self) -> int | None:
        """The round it has followed its primary to, None before it was filled."""
        with self._lock:
            now, followed = self._control_state, self._followed
            return None if now is None else now.round if followed is None else followed.round

    def _forget_arrays(self) -> None:
        self._arrays = {}
        self._states = ()
        self._slots = {}

    def _stand_at(self, control_state: ShardControlState) -> None:
        self._control_state = control_state
        self._followed = self._applied = None
        self._counted = {}
        self._scale = control_state.loss_scale

    def _after(
        self,
        record: ReplicatedJoin | ReplicatedConfig | Reconfigure,
        now: ShardControlState,
    ) -> ShardControlState:
        """Return the control state after a record; learn what of it is kept elsewhere."""
        match record:
            case ReplicatedJoin():
                self._ledger.admit(record.rank, record.incarnation)
                owners = dict(now.live_owners)
                owners.pop(record.rank, None)
                if record.process is not None:
                    owners[record.rank] = record.incarnation, record.process
                return dataclasses.replace(now, live_owners=owners)
            case ReplicatedConfig():
                self._spec = dataclasses.replace(self._spec, config=record.config)
                return dataclasses.replace(now, revision=record.revision)
            case Reconfigure():
                self._ledger.admit_all(record.newest)
                history = now.history
                if record.epoch > now.epoch:
                    history = (*history, (record.epoch, "reconfigured"))
                return dataclasses.replace(
                    now,
                    epoch=max(now.epoch, record.epoch),
                    schedule=record.schedule,
                    history=history,
                )

    @property
    def _present(self) -> ShardControlState | None:
        """The control state with the rounds followed since, but for the ledger."""
        now, followed, applied = self._control_state, self._followed, self._applied
        if now is None or followed is None:
            return now
        if applied is not None:
            overrides = _overrides_of(applied)
            now = dataclasses.replace(now, applied_revision=now.revision, overrides=overrides)
        now = dataclasses.replace(now, loss_scale=self._scale)
        changes = {
            name: getattr(followed, name)
            for name in ("round", "skipped", "outcome", "rejection", "lr", "active", "clock")
        }
        return dataclasses.replace(now, counted={**now.counted, **self._counted}, **changes)

    def _follow(self, now: ShardControlState, record: ReplicatedRound, mean: Flat | None) -> None:
        who = f"standby of shard {self._spec.index}"
        stands_at = now if self._followed is None else self._followed
        if record.round != stands_at.round + 1:
            raise IllegalMessage(
                f"{who}: expected round {stands_at.round + 1}, got round {record.round}"
            )
        if record.outcome == "applied":
            if not self._states:
                assert mean is not None
                self._step(stands_at.clock, record, mean, who)
            self._applied = record
        scaling = self._spec.config.loss_scale
        if scaling is not None:
            self._scale = scaling.after(self._scale or scaling.first, record.outcome)
        for rank, note in record.counted.items():
            self._ledger.admit(rank, note.incarnation)
            self._ledger.count(rank, note.incarnation, record.round)
        self._counted.update(record.counted)
        self._followed = record

    def _step(self, clock: Clock, record: ReplicatedRound, mean: Flat, who: str) -> None:
        config, overrides = self._spec.config, _overrides_of(record)
        absent = absent_in(note.settings for note in record.counted.values())
        arranged = self._arranger.of(config, clock, absent, overrides)
        apart = arranged if arranged.tells_clocks_apart else None
        scalars = step_scalars(clock, config, overrides, apart)
        if scalars.lr != record.lr:
            raise ShardsDisagree(
                f"{who}: lr={scalars.lr!r} at round {record.round}, its primary has "
                f"lr={record.lr!r}"
            )
        for space, stepper in self._steppers.items():
            step = RangeStep(
                slots=self._slots[space],
                gradients=[mean[space]],
                grouping=in_order(1),
                scalars=scalars,
            )
            stepper.step(step, arranged.together[space])


def _overrides_of(record: ReplicatedRound) -> bytes:
    """Return the learning rates and betas of an applied round alone, equal in all its pushes."""
    return next((note.settings.overrides for note in record.counted.values()), b"")
