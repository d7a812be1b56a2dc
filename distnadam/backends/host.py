"""What surrounds one shard wherever it lives: a lock, the callers' futures, the kernel's threads, and its checkpoint files.

It carries out the state machine's effects and knows nothing of how messages came.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from distnadam.arrays import Flat
from distnadam.checkpoint.format import read_shard, write_shard
from distnadam.checkpoint.manifest import Manifest
from distnadam.errors import ConfigError, LifecycleError
from distnadam.messages import Measured, Message, Restore, Save, ShardSpec
from distnadam.nadam.kernels import Part, Rates, Scratch, Slots, make_stepper, square_sums
from distnadam.nadam.norms import clip_scales
from distnadam.nadam.schedule import Clock, prepare, step_scalars
from distnadam.shard import Shard
from distnadam.state import ShardState
from distnadam.transitions import Compute, Effect, Work

Run = Callable[[Callable[[], None]], object]
Reply = Callable[[Any], None]
"""Takes an answer, or the error that is raised where the question was asked."""


def run_here(work: Callable[[], None]) -> None:
    """Carry out work in the calling thread."""
    work()


class ShardHost:
    """One shard and what it needs to run.

    Args:
        spec: the shard's spec.
        buffers: the two parameter buffers of its ranges where the process shares them.
        threads: threads of its kernel.
        run: carries out heavy work: at once in the calling thread, or by handing it to an executor.
    """

    def __init__(self, spec: ShardSpec, *, buffers: tuple[Flat, Flat] | None = None, threads: int = 1, run: Run = run_here) -> None:
        self._shard = Shard(spec, ShardState.empty(spec.ranges, buffers))
        self._spec, self._run_by_default = spec, run
        self._lock = threading.Lock()
        self._waiting: set[Reply] = set()
        self._closed = False
        self._steppers = {space: make_stepper(spec.options.kernel, space, threads) for space in spec.ranges}
        self._segments = {space: list(spec.layout.segments(space, *bounds)) for space, bounds in spec.ranges.items()}

    def send(self, message: Message) -> Future[Any]:
        """Give the shard a message; the future carries its answer or its refusal."""
        future: Future[Any] = Future()

        def reply(answer: Any) -> None:
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        self.deliver(message, reply)
        return future

    def deliver(self, message: Message, reply: Reply, run: Run | None = None) -> None:
        """Give the shard a message; `reply` is called once with its answer or error, now or later, in whichever thread has it.

        Heavy work that the message sets off is carried out by `run` where given.
        """
        run = run or self._run_by_default
        with self._lock:
            if not (closed := self._closed):
                self._waiting.add(reply)
        if closed:
            reply(_closed(self._spec.index))
            return
        if isinstance(message, (Save, Restore)):
            run(lambda: self._answer(reply, self._attempt(lambda: self._file(message))))
            return
        try:
            with self._lock:
                effects = self._shard.receive(message, reply)
        except Exception as error:
            self._answer(reply, error)
        else:
            self._carry_out(effects, run)

    def close(self) -> None:
        """Refuse what comes and answer who waits."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
        for reply in waiting:
            self._answer(reply, _closed(self._spec.index))
        for stepper in self._steppers.values():
            stepper.close()

    def _carry_out(self, effects: list[Effect], run: Run) -> None:
        for effect in effects:
            if isinstance(effect, Compute):
                work = effect.work
                run(lambda work=work: self._compute(work, run))  # type: ignore[misc]  # one Compute at a time
            else:
                self._answer(effect.caller, effect.reply)

    def _compute(self, work: Work, run: Run) -> None:
        try:
            result: Any = self._measure() if work is Work.MEASURE else self._step()
        except ConfigError as error:  # of the learning-rate function, before any array was touched
            with self._lock:
                effects = self._shard.refused(error)
            self._carry_out(effects, run)
            return
        except BaseException as error:
            with self._lock:
                effects = self._shard.broke(error)
            self._carry_out(effects, run)
            if not isinstance(error, Exception):
                raise
            return
        with self._lock:
            effects = self._shard.computed(work, result)
        self._carry_out(effects, run)
        if work is Work.STEP:
            prepare(result[0], self._shard.config)

    def _answer(self, reply: Reply, answer: Any) -> None:
        with self._lock:
            if reply not in self._waiting:
                return
            self._waiting.discard(reply)
        reply(answer)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            return error

    def _measure(self) -> Measured:
        """Sum the squares of the mean gradient, chunk by chunk."""
        gradients, found = self._shard.gradients(), []
        for space, segments in self._segments.items():
            offset = self._spec.ranges[space][0]
            scratch = Scratch(space)
            slices = [g[space] for g in gradients]
            found += [(s.tensor, square_sums(slices, s.begin - offset, s.end - offset, scratch)) for s in segments]
        return Measured(self._shard.round + 1, tuple(found))

    def _step(self) -> tuple[Clock, float]:
        """Apply the round's mean gradient; the new parameters go to the spare buffer."""
        shard, config = self._shard, self._shard.config
        scalars = step_scalars(shard.clock, config)
        rates = Rates(1.0 - config.beta_1, 1.0 - config.beta_2, config.clipvalue)
        gradients, state = shard.gradients(), shard.state
        for space, stepper in self._steppers.items():
            slots = Slots(state.params[space], state.m[space], state.v[space], state.spare[space])
            stepper.step(slots, [g[space] for g in gradients], scalars, rates, self._parts(space))
        return scalars.after, scalars.lr

    def _parts(self, space: str) -> list[Part]:
        begin, end = self._spec.ranges[space]
        sums = self._shard.square_sums()
        if sums is None:
            return [Part(0, end - begin)]
        scales = clip_scales(self._shard.config, sums)
        if len(set(scales)) <= 1:
            return [Part(0, end - begin, scales[0])]
        return [Part(s.begin - begin, s.end - begin, scales[s.tensor]) for s in self._segments[space]]

    def _file(self, message: Save | Restore) -> Any:
        """Write or read the shard's checkpoint file; nobody else moves a held shard meanwhile."""
        shard, spec, directory = self._shard, self._spec, Path(message.directory)
        shard.gate.require(message.token, spec.index)
        if isinstance(message, Save):
            return write_shard(directory, message.file_name, ranges=spec.ranges, state=shard.state.arrays())
        manifest = Manifest.from_bytes(message.manifest, str(directory))
        state = read_shard(directory, manifest, ranges=spec.ranges, leftovers=message.leftovers)
        with self._lock:
            shard.state.write(state)
            shard.load(Clock(manifest.iterations, manifest.m_schedule), manifest.round, manifest.skipped, manifest.ledger)
        return None


def _closed(index: int) -> LifecycleError:
    return LifecycleError(f"shard {index}: the optimizer was closed")
