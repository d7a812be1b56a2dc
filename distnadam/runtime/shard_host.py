"""One shard in its process: its state machine, the lock around it, its callers, and what carries
out its effects. It does not know how messages came. No Ray.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import Any

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
    Saved,
    ShardSpec,
    Write,
)
from distnadam.protocol.supervisor_events import StandbyLost
from distnadam.protocol.supervisor_messages import (
    AttachStandby,
    Load,
    Order,
    Reconfigure,
    Retire,
    ShardControlState,
)
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.replicator import ConnectStandby, Replicator
from distnadam.runtime.shard_files import ShardFiles
from distnadam.runtime.shard_kernel import ShardKernel
from distnadam.shard.effects import Answer, Effect, Notice, Replicate, Work
from distnadam.shard.machine import MESSAGES, Shard
from distnadam.shard.phases import AT_REST
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Flat, memory_for
from distnadam.threads import renew_after_fork

GradientsOf = Callable[[int, int, dict[str, str]], Flat | None]
"""From a rank, an incarnation and dtypes to the shard's ranges in that worker's memory; None if
this process does not have it.
"""


class ShardHost:
    """One shard and what it needs to run.

    Args:
        spec: the shard's spec.
        buffers: the two parameter buffers of its ranges, if the process shares them.
        threads: threads of its kernel.
        run_work: runs heavy work: at once in the calling thread, or in an executor's.
        on_notice: called with what happens to ranks and to the standby.
        connect_standby: returns the stream to a standby.
        can_send: whether effects may leave now; call `resume` when it turns true.

    Attributes:
        shard: the state machine; changed by messages only, under `lock`.
        lock: held while the machine is changed.
        gradients_of: finds the gradients of a push that is to be completed.
    """

    def __init__(
        self,
        spec: ShardSpec,
        *,
        buffers: tuple[Flat, Flat] | None = None,
        threads: int = 1,
        run_work: RunWork = run_in_this_thread,
        on_notice: Callable[[Notice], None] = lambda notice: None,
        connect_standby: ConnectStandby | None = None,
        can_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self.shard = Shard(spec, ShardState.empty(spec.ranges, buffers))
        self.gradients_of: GradientsOf = lambda rank, incarnation, dtypes: None
        self._spec = spec
        self._run_work = run_work
        self._connect_standby = connect_standby
        self._kernel = ShardKernel(spec, self.shard.state, threads)
        self.files = ShardFiles(spec.ranges)
        standby_lost = Notice(StandbyLost(shard=spec.index))
        self._replicator = Replicator(spec.index, lambda: on_notice(standby_lost))
        self._outbox = Outbox(
            {
                Answer: lambda effect: self._answer(effect.caller, effect.reply),
                Notice: on_notice,
                Replicate: self._replicator.replicate,
            },
            lambda work, run_work: run_work(lambda: self._compute(work, run_work)),
            run_work=run_work,
            can_send=can_send,
        )
        self.lock = self._outbox.lock
        self._waiting: set[Reply] = set()
        self._is_closed = False
        self._meter: Meter | None = None
        self._refusal = LifecycleError(f"shard {spec.index}: the optimizer was closed")
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Refuse everything in a forked child, if a thread that it lacks was to finish a round."""
        shard = self.shard
        if self._outbox.is_idle and shard.phase in AT_REST and not shard.exclusive_hold.holder:
            return
        self.lock = threading.Lock()
        self._is_closed = True
        self._waiting = set()
        self._refusal = LifecycleError(
            f"shard {self._spec.index}: this process was forked from its optimizer's while another "
            "thread stepped, saved or read it; use the optimizer in its own process, fork between "
            "two rounds, or restore a checkpoint here"
        )

    @property
    def control_state(self) -> ShardControlState:
        """The shard's state but for the arrays, while nothing is computed."""
        return self.shard.progress.control_state()

    def take_over(
        self, control_state: ShardControlState, arrays: dict[str, Flat], reconfigure: Reconfigure
    ) -> None:
        """Continue from a primary's state, before the first message, under the order that makes
        this shard the primary.
        """
        self.shard.state.load(arrays, control_state.active)
        self.shard.take_over(control_state, reconfigure)

    def attach_meter(self, meter: Meter) -> None:
        """Count the rounds applied in a meter, and have it sample the shard's status."""
        self._meter = meter
        meter.sources.append(lambda: shard_samples(self._spec, self._describe(Describe())))

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

    def deliver(
        self, message: Message | Order, reply: Reply, run_work: RunWork | None = None
    ) -> None:
        """Give the shard a message.

        Args:
            message: any message.
            reply: called once with the answer or the error, now or later, in any thread.
            run_work: runs heavy work that the message causes; None for the host's own.
        """
        with self.lock:
            is_closed = self._is_closed
            if not is_closed:
                self._waiting.add(reply)
        if is_closed:
            reply(self._refusal)
        else:
            handler = HANDLERS.get(type(message), ShardHost._receive)
            handler(self, message, reply, run_work or self._run_work)

    def resume(self) -> None:
        """Send the effects that could not leave before."""
        self._outbox.flush()

    def close(self) -> None:
        """Refuse further messages, and fail all callers that wait."""
        with self.lock:
            self._is_closed = True
            waiting = list(self._waiting)
        for reply in waiting:
            self._answer(reply, self._refusal)
        self._replicator.close()
        self._kernel.close()
        self.files.close()

    # Messages

    def _receive(self, message: Message | Order, reply: Reply, run_work: RunWork) -> None:
        try:
            self._outbox.put(lambda: self.shard.receive(message, reply), run_work)
        except Exception as error:
            self._answer(reply, error)
        else:
            self._outbox.flush()

    def _receive_after_copy(self, message: Write | Retire, reply: Reply, run_work: RunWork) -> None:
        """Have a background save copy the arrays before the message changes them."""
        self.files.wait_copied()
        self._receive(message, reply, run_work)

    def _complete_push(self, message: CompletePush, reply: Reply, run_work: RunWork) -> None:
        """Fill in the gradients from the worker's memory, if the sender has not."""
        note = message.note
        if note.dtypes is not None and message.gradients is None:
            found = self.gradients_of(message.rank, note.incarnation, note.dtypes)
            message = dataclasses.replace(message, gradients=found)
        self._receive(message, reply, run_work)

    def _reply_to_describe(self, message: Describe, reply: Reply, _: RunWork) -> None:
        """Answer at once, whatever waits in the outbox."""
        self._answer(reply, self._describe(message))

    def _reserve(self, _: Reserve, reply: Reply, run_work: RunWork) -> None:
        run_work(lambda: self._answer(reply, self._attempt(self.files.reserve)))

    def _save(self, message: Save, reply: Reply, run_work: RunWork) -> None:
        def save() -> Any:
            with self.lock:
                self.shard.require_hold(message.token)
                saved = Saved(self.shard.progress.num_changes)
            return self.files.save(
                message,
                self.shard.state.arrays(),
                # it has no effects, so the saver's thread sends none, nor begins the work of any
                on_written=lambda: self._outbox.put(
                    lambda: self.shard.receive(saved, None), run_work
                ),
            )

        run_work(lambda: self._answer(reply, self._attempt(save)))

    def _collect(self, message: Collect, reply: Reply, _: RunWork) -> None:
        self.files.collect(message.file_name, partial(self._answer, reply))

    # Work

    def _compute(self, work: Work, run_work: RunWork) -> None:
        shard = self.shard
        try:
            result = _WORK[work](self)
        except BaseException as error:
            if work is Work.STEP and isinstance(error, ConfigError):
                # The learning-rate function raised, before any array was touched.
                self._report(partial(shard.refused, error), run_work)
            else:
                self._report(partial(shard.broke, error), run_work)
            if not isinstance(error, Exception):
                raise
        else:
            self._report(lambda: shard.computed(work, result), run_work)
            if work is Work.STEP:
                prepare(result[0], shard.config)

    def _measure(self) -> PartialNorms:
        return self._kernel.measure(self.shard)

    def _step(self) -> tuple[Clock, float]:
        self.files.wait_copied()
        began = perf_counter()
        result = self._kernel.step(self.shard, self._replicator.memory_for_mean())
        if self._meter is not None:
            self._meter.apply.add(perf_counter() - began)
        return result

    def _load_or_copy(self) -> Any:
        """Carry out the next order; an error is its answer, and leaves a load without a state."""
        order = self.shard.loads.first
        self.files.wait_copied()
        if isinstance(order, Load):
            return self._attempt(lambda: self.files.load(order, self.shard.state))
        assert order is not None
        return self._attempt(lambda: self._attach_standby(order))

    def _attach_standby(self, order: AttachStandby) -> int:
        assert self._connect_standby is not None
        self._replicator.close()
        shard = self.shard
        with self.lock:
            control_state = self.control_state
        stream = self._connect_standby(
            order.standby, control_state, shard.config, shard.state.arrays()
        )
        with self.lock:  # no standby was sent what came meanwhile
            self._replicator.attach(stream)
            reconfigure = Reconfigure(
                epoch=shard.epochs.now,
                schedule=shard.members.schedule,
                newest=shard.members.ledger.newest_of_all(),
            )
        stream.send(reconfigure)
        return shard.progress.round

    def _report(self, change: Callable[[], list[Effect]], run_work: RunWork) -> None:
        self._outbox.put(change, run_work)
        self._outbox.flush()

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            with memory_for(f"shard {self._spec.index}: a copy of its state"):
                return work()
        except Exception as error:
            return error

    # Answers

    def _answer(self, reply: Reply, answer: Any) -> None:
        with self.lock:
            if reply not in self._waiting:
                return
            self._waiting.discard(reply)
        reply(answer)

    def _describe(self, message: Describe) -> Description:
        with self.lock:
            description = self.shard.describe(with_spec=message.spec)
            replicated = self._replicator.reached
        return dataclasses.replace(
            description,
            busy=description.busy or self.files.is_saving,
            replicated=replicated,
            saved=self.files.directory,
        )


HANDLERS: dict[type, Callable[[ShardHost, Any, Reply, RunWork], None]] = {
    **dict.fromkeys(MESSAGES, ShardHost._receive),
    Write: ShardHost._receive_after_copy,
    Retire: ShardHost._receive_after_copy,
    CompletePush: ShardHost._complete_push,
    Describe: ShardHost._reply_to_describe,
    Reserve: ShardHost._reserve,
    Save: ShardHost._save,
    Collect: ShardHost._collect,
}
"""The one dispatch of messages: to the machine, through what the host must do first, or to the host
alone.
"""

_WORK: dict[Work, Callable[[ShardHost], Any]] = {
    Work.MEASURE: ShardHost._measure,
    Work.STEP: ShardHost._step,
    Work.LOAD_OR_COPY: ShardHost._load_or_copy,
}
