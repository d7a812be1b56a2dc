"""What surrounds one shard wherever it lives: a lock, the callers' futures, the kernel's threads,
its checkpoint files, its standby.

It carries out the state machine's effects and knows nothing of how messages came.
"""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter
from typing import Any, ClassVar

from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import fill_shard, write_shard
from distnadam.checkpoint.storage.base import parent_of
from distnadam.config import NadamConfig
from distnadam.errors import ConfigError, LifecycleError
from distnadam.metrics.meter import Meter, shard_samples
from distnadam.nadam.step_scalars import Clock, prepare
from distnadam.protocol.delivery import Reply, RunWork, run_in_this_thread
from distnadam.protocol.messages import (
    Collect,
    CompletePush,
    Describe,
    Description,
    Message,
    PartialNorms,
    Reserve,
    Save,
    ShardSpec,
    Write,
)
from distnadam.protocol.supervisor_events import StandbyLost
from distnadam.protocol.supervisor_messages import (
    AttachStandby,
    DetachStandby,
    Load,
    Order,
    Reconfigure,
    Retire,
    ShardControlState,
)
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.shard_kernel import ShardKernel
from distnadam.runtime.snapshot import SnapshotWriter
from distnadam.shard.machine import Shard, described
from distnadam.shard.phases import Answer, Effect, Notice, Replicate, Work
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Flat, memory_for
from distnadam.transport.replication import ReplicationStream

log = logging.getLogger("distnadam")

_CHANGES = (Write, Retire)
"""What changes a shard's arrays at once, or has others change them; a step and an order do so where
they are carried out.
"""
FindGradients = Callable[[int, int, dict[str, str]], Flat | None]
"""From a rank, an incarnation and dtypes to the shard's ranges in that worker's memory, where the
process has it.
"""


class ShardHost:
    """One shard and what it needs to run.

    Args:
        spec: the shard's spec.
        buffers: the two parameter buffers of its ranges where the process shares them.
        threads: threads of its kernel.
        run_work: runs heavy work: at once in the calling thread, or in an executor's.
        on_notice: told what happens to ranks and to the standby.
        connect_standby: returns the stream to a standby, from what `AttachStandby` carries, the
            shard's control state, its config and its arrays.
        can_send: whether effects may leave now; call `resume` when it turns true.
    """

    def __init__(
        self,
        spec: ShardSpec,
        *,
        buffers: tuple[Flat, Flat] | None = None,
        threads: int = 1,
        run_work: RunWork = run_in_this_thread,
        on_notice: Callable[[Notice], None] = lambda notice: None,
        connect_standby: Callable[
            [Any, ShardControlState, NadamConfig, dict[str, Flat]], ReplicationStream
        ]
        | None = None,
        can_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self.shard = Shard(spec, ShardState.empty(spec.ranges, buffers))
        self._on_notice = on_notice
        self._connect_standby = connect_standby
        self._replica: ReplicationStream | None = None
        self.gradients_of: FindGradients = lambda rank, incarnation, dtypes: None
        self._spec = spec
        self._run_work = run_work
        self._lock = threading.Lock()
        self._outbox = Outbox(
            self._lock,
            self._carry_out,
            lambda work, run: run(lambda: self._compute(work, run)),
            run_work,
            can_send,
        )
        self._waiting: set[Reply] = set()
        self._closed = False
        self._filing = 0
        self._saved: str | None = None
        self._behind = SnapshotWriter(spec.ranges)
        self._meter: Meter | None = None
        self._arithmetic = ShardKernel(spec, threads)

    @property
    def control_state(self) -> ShardControlState:
        """Where the shard stands, while nothing is computed."""
        return self.shard.control_state

    def take_over(
        self, control_state: ShardControlState, arrays: dict[str, Flat], reconfigure: Any
    ) -> None:
        """Stand where a primary stood, before the first message: with its arrays, under the order
        that makes this shard the primary.
        """
        self.shard.state.load(arrays, control_state.active)
        self.shard.take_over(control_state, reconfigure)

    def attach_meter(self, meter: Meter) -> None:
        """Count the rounds applied in a meter, and tell it how the shard stands."""
        self._meter = meter
        meter.sources.append(lambda: shard_samples(self._spec, self._described(with_spec=False)))

    def send(self, message: Message | Order) -> Future[Any]:
        """Give the shard a message; the future carries its answer or its refusal."""
        future: Future[Any] = Future()

        def reply(answer: Any) -> None:
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        self.deliver(message, reply)
        return future

    def deliver(self, message: Message | Order, reply: Reply, run: RunWork | None = None) -> None:
        """Give the shard a message; `reply` is called once with its answer or error, now or later,
        in whichever thread has it.

        Heavy work that the message sets off is carried out by `run` where given.
        """
        run = run or self._run_work
        with self._lock:
            if not (closed := self._closed):
                self._waiting.add(reply)
        if closed:
            reply(_closed(self._spec.index))
            return
        if isinstance(message, Collect):
            self._behind.collect(message.file_name, lambda answer: self._answer(reply, answer))
            return
        if isinstance(message, (Reserve, Save)):
            work = (
                self._behind.reserve
                if isinstance(message, Reserve)
                else functools.partial(self._save, message)
            )
            run(lambda: self._answer(reply, self._attempt(work)))
            return
        if (
            isinstance(message, CompletePush)
            and message.note.dtypes is not None
            and message.gradients is None
        ):
            found = self.gradients_of(message.rank, message.note.incarnation, message.note.dtypes)
            message = dataclasses.replace(message, gradients=found)
        if isinstance(message, _CHANGES):
            self._behind.settle()
        if isinstance(message, Describe):
            self._answer(
                reply, self._described(with_spec=message.spec)
            )  # at once, whatever is being told to the standby
            return
        try:
            with self._lock:
                self._outbox.put(self.shard.receive(message, reply), run)
        except Exception as error:
            self._answer(reply, error)
        else:
            self._outbox.empty()

    def resume(self) -> None:
        """Tell what could not be told before."""
        self._outbox.empty()

    def close(self) -> None:
        """Refuse what comes and answer who waits."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
        for reply in waiting:
            self._answer(reply, _closed(self._spec.index))
        if self._replica is not None:
            self._replica.close()
        self._arithmetic.close()
        self._behind.close()

    def _carry_out(self, effect: Answer | Notice | Replicate) -> None:
        if isinstance(effect, Answer):
            self._answer(effect.caller, effect.reply)
        elif isinstance(effect, Notice):
            self._on_notice(effect)
        elif self._replica is not None:
            self._replicate(effect, self._replica)

    def _compute(self, work: Work, run: RunWork) -> None:
        try:
            result = self._WORK[work](self)
        except ConfigError as error:  # of the learning-rate function, before any array was touched
            refusal = error
            self._report(lambda: self.shard.refused(refusal), run)
        except BaseException as error:
            failure = error
            self._report(lambda: self.shard.broke(failure), run)
            if not isinstance(error, Exception):
                raise
        else:
            self._report(lambda: self.shard.computed(work, result), run)
            if work is Work.STEP:
                prepare(result[0], self.shard.config)

    def _report(self, outcome: Callable[[], list[Effect]], run: RunWork) -> None:
        with self._lock:
            self._outbox.put(outcome(), run)
        self._outbox.empty()

    def _answer(self, reply: Reply, answer: Any) -> None:
        with self._lock:
            if reply not in self._waiting:
                return
            self._waiting.discard(reply)
        reply(answer)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            with memory_for(f"shard {self._spec.index}: a copy of its state"):
                return work()
        except Exception as error:
            return error

    def _measure(self) -> PartialNorms:
        return self._arithmetic.measure(self.shard)

    def _step(self) -> tuple[Clock, float]:
        self._behind.settle()
        began = perf_counter()
        if self._replica is not None and not self._replica.ready():
            self._detach()
        result = self._arithmetic.step(
            self.shard, None if self._replica is None else self._replica.mean
        )
        if self._meter is not None:
            self._meter.apply.add(perf_counter() - began)
        return result

    def _save(self, message: Save) -> Any:
        """Write the shard's checkpoint file, or a copy of it later; nobody else moves a held shard
        meanwhile.
        """
        shard, ranges = self.shard, self._spec.ranges
        shard.exclusive_hold.require(message.token, self._spec.index)
        before, arrays = shard.changed, shard.state.arrays()

        def write(state: dict[str, Flat]) -> Any:
            record = write_shard(message.directory, message.file_name, ranges=ranges, state=state)
            if shard.changed is before:
                shard.changed = None
            self._saved = parent_of(message.directory)
            return record

        self._filing += 1
        try:
            return (
                self._behind.snapshot(message.file_name, arrays, write)
                if message.behind
                else write(arrays)
            )
        finally:
            self._filing -= 1

    def _obey(self) -> Any:
        """Load or copy the state as the supervisor ordered; what fails is the answer, and leaves a
        shard that loads without a state.
        """
        order = self.shard.order
        self._behind.settle()
        return self._attempt(
            lambda: self._load(order) if isinstance(order, Load) else self._attach(order)
        )

    def _load(self, order: Load) -> ShardControlState:
        spec, state = self._spec, self.shard.state
        if order.state is not None and order.control_state is not None:
            state.load(order.state, order.control_state.active)
            return order.control_state
        if order.directory is None:
            state.load({"params": order.params or {}})
            return ShardControlState(
                epoch=order.epoch,
                round=0,
                skipped=0,
                clock=Clock(),
                lr=0.0,
                active=0,
                outcome="applied",
                rejection=None,
                ledger={"runs": [], "newest": []},
            )
        manifest = Manifest.from_bytes(order.manifest, order.directory)
        fill_shard(
            order.directory,
            manifest,
            ranges=spec.ranges,
            state=state.reset(),
            leftovers=order.leftovers,
        )
        self._saved = parent_of(order.directory)
        clock = Clock(manifest.iterations, manifest.m_schedule)
        return ShardControlState(
            epoch=order.epoch,
            round=manifest.round,
            skipped=manifest.skipped,
            clock=clock,
            lr=0.0,
            active=0,
            outcome="applied",
            rejection=None,
            ledger=manifest.ledger,
        )

    def _attach(self, order: AttachStandby) -> int:
        assert self._connect_standby is not None
        self._detach(told=False)
        shard = self.shard
        with self._lock:
            control_state = shard.control_state
        replica = self._connect_standby(
            order.standby, control_state, shard.config, shard.state.arrays()
        )
        with self._lock:  # what came meanwhile was told to no standby
            self._replica = replica
            reconfigure = Reconfigure(
                epoch=shard.epochs.now,
                schedule=shard.members.schedule,
                newest=shard.members.ledger.newest_of_all(),
            )
        replica.send(reconfigure)
        return shard.round

    def _replicate(self, effect: Replicate, replica: ReplicationStream) -> None:
        """Let the standby have a record before anyone hears of what it says; one that cannot keep
        up is let go.
        """
        if isinstance(effect.record, DetachStandby) or not replica.send(effect.record):
            self._detach()

    def _detach(self, *, told: bool = True) -> None:
        if self._replica is not None:
            self._replica.close()
            self._replica = None
            if told:
                log.warning(
                    "shard %d: its standby is gone or out of date; a new one will be filled",
                    self._spec.index,
                )
                self._on_notice(Notice(StandbyLost(shard=self._spec.index)))

    def _described(self, *, with_spec: bool) -> Description:
        """Return the shard's description, with what only its host knows."""
        with self._lock:
            told, replica = described(self.shard, with_spec=with_spec), self._replica
        reached = replica.reached if replica is not None else None
        return dataclasses.replace(
            told, busy=told.busy or self._filing > 0, replicated=reached, saved=self._saved
        )

    _WORK: ClassVar[dict[Work, Callable[["ShardHost"], Any]]] = {
        Work.MEASURE: _measure,
        Work.STEP: _step,
        Work.LOAD_OR_COPY: _obey,
    }


def _closed(index: int) -> LifecycleError:
    return LifecycleError(f"shard {index}: the optimizer was closed")
