"""One shard in its process: its state machine, the lock around it, its callers, and what carries
out its effects. It does not know how messages came. No Ray.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from distnadam.errors import ConfigError, LifecycleError
from distnadam.metrics.meter import Meter, shard_samples
from distnadam.nadam.step_scalars import Clock, prepare
from distnadam.protocol.delivery import Reply, RunWork, run_in_this_thread
from distnadam.protocol.messages import (
    Collect,
    CompletePush,
    Describe,
    Description,
    FileMessage,
    Message,
    PartialNorms,
    Push,
    Reserve,
    RoundResult,
    Save,
    ShardSpec,
    Step,
    Write,
)
from distnadam.protocol.supervisor_messages import (
    AttachStandby,
    Load,
    Order,
    Reconfigure,
    Retire,
    ShardControlState,
)
from distnadam.runtime.answering import attempt, resolves
from distnadam.runtime.file_messages import FileMessages
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.replicator import ConnectStandby, Replicator
from distnadam.runtime.rounds_ahead import RoundsAhead, rounds_ahead
from distnadam.runtime.shard_files import ShardFiles
from distnadam.runtime.shard_kernel import ShardKernel
from distnadam.shard import ordinary
from distnadam.shard.effects import Answer, Notice, Replicate, Work
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary_push import enter_push
from distnadam.shard.phases import AT_REST
from distnadam.shard.state import ShardState, frozen_in
from distnadam.tensors.arrays import Flat
from distnadam.threads import renew_after_fork

_T = TypeVar("_T")
GradientsOf = Callable[[int, int, dict[str, str]], Flat | None]
"""From a rank, an incarnation and dtypes to the shard's ranges in that worker's memory, if here."""


class ShardHost:
    """One shard and what it needs to run.

    Args:
        spec: the shard's spec.
        buffers: the two parameter buffers of its ranges, in the layout's `pull_dtypes`, if the
            process shares them.
        threads: threads of its kernel.
        run_work: runs heavy work: at once in the calling thread, or in an executor's.
        on_notice: called with what happens to ranks and to the standby.
        can_send: whether effects may leave now, None if always; call `resume` when it turns true.

    Attributes:
        shard: the state machine; changed by messages only, under `lock`.
        lock: held while the machine is changed.
        gradients_of: finds the gradients of a push that is to be completed.
        connect_standby: returns the stream to a standby; None where there can be none.
        traffic_of, links_of: return what a `Description` says of traffic and of links.
    """

    def __init__(
        self,
        spec: ShardSpec,
        *,
        buffers: tuple[Flat, Flat] | None = None,
        threads: int = 1,
        run_work: RunWork = run_in_this_thread,
        on_notice: Callable[[Notice], None] = lambda notice: None,
        can_send: Callable[[], bool] | None = None,
    ) -> None:
        state = ShardState.empty(
            spec.ranges,
            buffers,
            spec.layout.pull_dtypes,
            arrays=spec.config.state_arrays,
            frozen=frozen_in(spec.layout, spec.ranges),
        )
        self.shard = Shard(spec, state)
        self.gradients_of: GradientsOf = lambda rank, incarnation, dtypes: None
        self.connect_standby: ConnectStandby | None = None
        self.traffic_of: Callable[[], Mapping[str, tuple[int, int]]] = dict
        self.links_of: Callable[[], Mapping[str, float]] = dict
        self._spec = spec
        self._run_work = run_work
        self._kernel = ShardKernel(spec, state, threads)
        self.files = ShardFiles(spec.ranges, spec.config.state_arrays)
        self._replicator = Replicator(spec.index, lambda lost: on_notice(Notice(lost)))
        self._outbox = Outbox(
            {Answer: self._answer, Notice: on_notice},
            self._compute,
            run_work=run_work,
            can_send=can_send,
        )
        self.lock = self._outbox.lock
        self._file_messages = FileMessages(self.shard, self._outbox, self.files)
        self._waiting: set[Reply] = set()
        self._is_closed = False
        self._idle_since = perf_counter()
        self._meter: Meter | None = None
        self._stepped_s = 0.0
        self._refusal = LifecycleError(f"shard {spec.index}: the optimizer was closed")
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Refuse everything in a forked child, if a thread that it lacks was to finish a round."""
        shard = self.shard
        if self._outbox.is_idle and shard.phase in AT_REST and not shard.exclusive_hold.holder:
            return
        self.lock = self._outbox.lock = threading.Lock()
        self._outbox.put_off = None
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
        """Continue from a primary's state, under the order that makes this shard the primary."""
        self.shard.state.load(arrays, control_state.active)
        self.shard.progress.take_over(control_state, reconfigure)
        if reconfigure.config is not None and reconfigure.revision > control_state.revision:
            self.shard.config = reconfigure.config  # its primary died before it was told
            self.shard.progress.revision = reconfigure.revision

    def attach_meter(self, meter: Meter) -> None:
        """Count the rounds applied in a meter, and have it sample the shard's status."""
        self._meter = meter
        meter.sources.append(lambda: shard_samples(self._spec, self._describe(Describe())))

    def send(self, message: Message | Order) -> Future[Any]:
        """Give the shard a message; the future carries its answer or its refusal."""
        future: Future[Any] = Future()
        self.deliver(message, resolves(future))
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
        run_work = run_work or self._run_work
        self._waiting.add(reply)
        if self._is_closed:  # asked after that, so that `close` answers whom this does not
            self._answer(Answer(reply, self._refusal))
            return
        if type(message) is Push:
            is_due = self._outbox.enter(run_work, enter_push, self.shard, message, reply)
            if is_due:
                run_work(partial(self._compute, Work.STEP, run_work))
            if is_due is not None:
                return
        if (take := TAKEN_HERE.get(type(message))) is not None:
            take(self, message, reply, run_work)
            return
        try:
            if (prepared := PREPARED.get(type(message))) is not None:
                message = prepared(self, message)
            must_send = self._outbox.put(run_work, self.shard.receive, message, reply)
        except Exception as error:
            self._answer(Answer(reply, error))
        else:
            if must_send:
                self._outbox.send()

    def step_at_once(self, first: Push | Step, *others: Push) -> RoundResult | None:
        """Take what an ordinary round still lacks, and step it in this thread, or raise what that
        raises.

        None if the round is another, or its end may not be told now: then `deliver` is to be called
        with each of the messages, of which none has changed anything or all have been counted.
        """
        shard, outbox = self.shard, self._outbox
        with self.lock:
            if outbox.put_off is not None:
                outbox.settle()
            if self._is_closed or not outbox.may_begin or not ordinary.close(shard, first, *others):
                return None
        try:
            clock, lr = self._step()
        except BaseException as error:
            self._fail(Work.STEP, error, self._run_work)
            raise
        with self.lock:
            replicates = self._replicator.stream is not None
            effects = ordinary.end(shard, clock, lr, replicates=replicates)
            result = shard.progress.result(want_parameters=False)
            must_send = bool(effects) and outbox.queue(self._run_work, effects)
        if must_send:
            outbox.send()
        # else it was retired meanwhile, its lease has ended, or another thread sends the record
        return result if result.round == first.round and outbox.may_begin else None

    def go_ahead(self, numbers: Sequence[int], pushes: Sequence[Push]) -> RoundsAhead | None:
        """Return what takes the rounds from the next on, while each is of pushes like these, which
        made up the last and came in frames of these numbers; None if they must be taken singly.
        """
        return self.go_ahead_by(rounds_ahead, numbers, pushes)

    def go_ahead_by(self, prepare: Callable[..., _T | None], *last: Any) -> _T | None:
        """Return what `prepare` makes of what made up the `last` round; None as `go_ahead`."""
        with self.lock:
            self._outbox.settle()
            if self._is_closed or not self.files.snapshots.copied.is_set():
                return None
            told = self._stepped, partial(self._fail, Work.STEP, run_work=self._run_work)
            return prepare(self.shard, self._outbox, self._kernel, self._replicator, *last, *told)

    def resume(self) -> None:
        """Send the effects that could not leave before."""
        self._outbox.flush()

    def close(self) -> None:
        """Refuse further messages, and fail all callers that wait."""
        self._is_closed = True
        if self._outbox.put_off is not None:
            with self.lock:
                self._outbox.settle()
        for reply in list(self._waiting):
            self._answer(Answer(reply, self._refusal))
        self._replicator.close()
        self._kernel.close()
        self.files.close()

    # Messages

    def _after_copy(self, message: _T) -> _T:
        """Have a background save copy the arrays before the message changes them."""
        self.files.snapshots.copied.wait()
        return message

    def _with_gradients(self, message: CompletePush) -> CompletePush:
        """Fill in the gradients from the worker's memory, if the sender has not."""
        note = message.note
        if note.dtypes is None or message.gradients is not None:
            return message
        found = self.gradients_of(message.rank, note.incarnation, note.dtypes)
        return dataclasses.replace(message, gradients=found)

    def _reply_to_describe(self, message: Describe, reply: Reply, _: RunWork) -> None:
        """Answer at once, whatever waits in the outbox."""
        self._answer(Answer(reply, self._describe(message)))

    def _take_file_message(self, message: FileMessage, reply: Reply, run_work: RunWork) -> None:
        self._file_messages.take(message, lambda a: self._answer(Answer(reply, a)), run_work)

    # Work

    def _compute(self, work: Work, run_work: RunWork) -> None:
        try:
            result = _WORK[work](self)
        except BaseException as error:
            self._fail(work, error, run_work)
            if not isinstance(error, Exception):
                raise
        else:
            self._idle_since = perf_counter()
            if self._outbox.put(run_work, self.shard.computed, work, result):
                self._outbox.send()
        if work is Work.STEP:
            prepare(self.shard.progress.clock, self.shard.config)

    def _fail(self, work: Work, error: BaseException, run_work: RunWork) -> None:
        # a learning-rate function raises before any array is touched
        is_refusal = work is Work.STEP and isinstance(error, ConfigError)
        change = self.shard.refused if is_refusal else self.shard.broke
        if self._outbox.put(run_work, change, error):
            self._outbox.send()

    def _measure(self) -> PartialNorms:
        return self._kernel.measure(self.shard)

    def _step(self) -> tuple[Clock, float]:
        if not (copied := self.files.snapshots.copied).is_set():
            copied.wait()
        began = perf_counter()
        replicator = self._replicator
        keep = None if replicator.stream is None else replicator.memory_for_mean()
        result = self._kernel.step(self.shard, keep)
        self._stepped(perf_counter() - began)
        return result

    def _stepped(self, seconds: float) -> None:
        """Record what a step took, which has just ended."""
        self._stepped_s += seconds
        self._idle_since = perf_counter()
        if self._meter is not None:
            self._meter.apply.add(seconds)

    def _load_or_copy(self) -> Any:
        """Carry out the next order; an error is its answer, and leaves a load without a state."""
        order = self.shard.loads.first
        self.files.snapshots.copied.wait()
        if isinstance(order, Load):
            return attempt(self._spec.index, lambda: self.files.load(order, self.shard.state))
        assert order is not None
        return attempt(self._spec.index, lambda: self._attach_standby(order))

    def _attach_standby(self, order: AttachStandby) -> int:
        assert self.connect_standby is not None
        self._replicator.release(order.standby)
        shard = self.shard
        with self.lock:
            self._outbox.settle()
            control_state = self.control_state
        stream = self.connect_standby(order.standby, control_state, shard.config, shard.state)
        with self.lock:  # this one was not sent what came meanwhile
            before = self._replicator.attach(stream, order.standby)
            self._outbox.carriers[Replicate] = self._replicator.replicate
            missed = shard.progress.missed_by_copy()
        stream.send(missed)
        if before is not None:
            before.close()
        return shard.progress.round

    # Answers

    def _answer(self, answer: Answer) -> None:
        """Answer a caller that waits; one that does not was answered when the host was closed."""
        try:
            self._waiting.remove(answer.caller)  # by one thread, if several have an answer
        except KeyError:
            return
        answer.caller(answer.reply)

    def _describe(self, message: Describe) -> Description:
        with self.lock:
            self._outbox.settle()
            description = self.shard.describe(with_spec=message.spec)
            replicated = self._replicator.reached
        return dataclasses.replace(
            description,
            busy=description.busy or self.files.is_saving,
            replicated=replicated,
            saved=self.files.directory,
            idle_s=perf_counter() - self._idle_since,
            stepped_s=self._stepped_s,
            traffic=self.traffic_of(),
            links=self.links_of(),
        )


PREPARED: dict[type, Callable[[ShardHost, Any], Any]] = {
    Write: ShardHost._after_copy,
    Retire: ShardHost._after_copy,
    CompletePush: ShardHost._with_gradients,
}
"""What is done with a message before the machine gets it, or what it then gets instead."""

TAKEN_HERE: dict[type, Callable[[ShardHost, Any, Reply, RunWork], None]] = {
    Describe: ShardHost._reply_to_describe,
    **dict.fromkeys((Reserve, Save, Collect), ShardHost._take_file_message),
}
"""The messages that the machine does not get; it gets all others."""

_WORK: dict[Work, Callable[[ShardHost], Any]] = {
    Work.MEASURE: ShardHost._measure,
    Work.STEP: ShardHost._step,
    Work.LOAD_OR_COPY: ShardHost._load_or_copy,
}
