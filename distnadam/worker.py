"""One data-parallel worker: pushes its rank's gradients for each round, and sees the parameters
between rounds. No maths, no Ray.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from time import perf_counter
from typing import Any

from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.parameter_view import ParameterView
from distnadam.client.shard_group import ShardGroup
from distnadam.client.worker_session import InFlightPush, WorkerSession
from distnadam.errors import DistNadamError, LifecycleError, NonFiniteGradient, StepTimeout
from distnadam.metrics.meter import Traffic
from distnadam.protocol.messages import RoundResult


class Ticket:
    """A push on its way; `result` waits until its round is decided."""

    def __init__(self, finish: Callable[[], RoundResult]) -> None:
        self._finish = finish
        self._decided: RoundResult | None = None
        self._error: DistNadamError | None = None

    def result(self) -> int:
        """Return the number of steps applied once the round is decided.

        Raises:
            NonFiniteGradient: a worker's gradient was not finite and the round was refused; no
                shard has moved.
            StaleEpoch: the state was replaced meanwhile; pull and compute again.
            Rewound: (a StaleEpoch) a shard died and all went back to round `error.step`; pull and
                compute again from there.
            StepTimeout: the other workers did not push, or a shard did not answer, in time; the
                message names them. May be called again.
            WorkerLost: another rank's worker died before it pushed, and nobody took it over; this
                push counts nowhere, and another gradient may be pushed for the round.
            Unrecoverable: a shard died, and the settings allow no recovery.
        """
        if self._error is not None:
            raise self._error
        if self._decided is None:
            try:
                self._decided = self._finish()
            except StepTimeout:
                raise  # may be waited for again
            except DistNadamError as error:
                self._error = error
                raise
        return self._decided.iterations


class Worker:
    """One rank of a data-parallel run; made by `DistNadam.worker`. Not for use by two threads at
    once.

    What `pull` and `step` return is read-only, owned by the worker, and good until its next call;
    copy to keep. A pickled worker becomes, where it is unpickled, a new worker that takes the rank
    over.
    """

    def __init__(self, shards: ShardGroup, rank: int) -> None:
        self.rank = rank
        self._shards, self._layout = shards, shards.layout
        self._session = WorkerSession(shards, rank)
        self._outstanding: Ticket | None = None
        self._closed = False
        self._viewed: tuple[Any, list[ParameterView]] = (None, [])
        self._meter = shards.backend.meter
        self._traffic: tuple[Any, Any, Traffic] = (None, None, Traffic({}, {}))

    @cached_property
    def _buffer(self) -> GradientBuffer:
        check = self._shards.options.check_gradients
        return GradientBuffer(
            self._layout, f"worker {self.rank}", self._session.channel.gradients, check=check
        )

    @property
    def _views(self) -> list[ParameterView]:
        """One view of own memory, or of both buffers that are shared with the shards; made anew
        where those moved.
        """
        shared = self._session.channel.parameters
        if not self._viewed[1] or self._viewed[0] is not shared:
            views = (
                [ParameterView(self._layout)]
                if shared is None
                else [ParameterView(self._layout, flat) for flat in shared]
            )
            self._viewed = (shared, views)
        return self._viewed[1]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._shards.backend.name == "local":
            raise LifecycleError(
                "a local optimizer's worker lives in its process and cannot be pickled; use "
                "backend='ray' to share it"
            )
        return Worker, (self._shards, self.rank)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def round(self) -> int:
        """Rounds decided when this worker last looked; its next push is for the one after, and
        batches follow it.
        """
        if self._session.epoch < 0:
            self._session.pull(want_parameters=False)
        return self._session.round

    def pull(self) -> Any:
        """Return the present parameters in the structure given to `build`, each in its own dtype,
        once this worker's push is decided.
        """
        self._settle()
        began = perf_counter()
        self._take(self._session.pull(want_parameters=True))
        if self._meter is not None:
            self._meter.pull.add(perf_counter() - began)
            self._moved().pulled += 1
        return self._tree()

    def push(self, gradients: Any = None) -> Ticket:
        """Send this rank's gradients for the next round and return at once; the ticket's `result`
        waits for the round.

        They count once, also where a Ctrl-C or a timeout cuts this call or its `result` off: the
        worker's next call sees them through.

        Args:
            gradients: a tree like the one given to `build`, of floating-point arrays of the same
                shapes; they may be reused at once. Where all of them come in one half precision,
                half the bytes are moved, and summed in float32. None: what was written into the
                views of `gradients()`, or given tensor by tensor to `push_tensor`.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's, or was not pushed;
                nothing was sent.
            LifecycleError: there is nothing to send.
        """
        return self._push(gradients, want_parameters=False)

    def step(self, gradients: Any = None) -> Any:
        """Push this rank's gradients, wait until every rank's are averaged and applied, and return
        the new parameters.

        Args:
            gradients: as `push` takes them.

        Raises:
            StructureError, LifecycleError: as `push`. NonFiniteGradient, StaleEpoch, Rewound,
            StepTimeout, WorkerLost, Unrecoverable: as `Ticket.result`.
        """
        began = perf_counter()
        self._push(gradients, want_parameters=True).result()
        if self._meter is not None:
            self._meter.step.add(perf_counter() - began)
            self._traffic[2].pulled += 1
        return self._tree()

    def push_tensor(self, path: str, gradient: Any) -> None:
        """Take one tensor's gradient as the backward pass yields it; `push()` or `step()` with no
        argument sends them once all came.

        Args:
            path: the tensor's place in the tree given to `build`, such as ``"layers/0/kernel"``.
            gradient: a floating-point array of its shape; it may be reused at once.

        Raises:
            StructureError: no such tensor, given twice, or of another shape or kind of dtype.
        """
        self._settle()
        self._buffer.put(path, gradient)

    def gradients(self, dtype: str | None = None) -> Any:
        """Return this worker's slot as writable views in the structure given to `build`; `push()`
        or `step()` sends what they hold.

        With several processes on a machine the views lie in memory that the shards read, so nothing
        is copied. They are the caller's to write between a call that ended a round (`step`, `pull`,
        `Ticket.result`) and the next push, and stay good for the worker's life.

        Args:
            dtype: None for float32 (float64 where the parameter is), or "float16" or "bfloat16" for
                half the bytes.
        """
        self._settle()
        return self._buffer.views(dtype)

    def parameters(self) -> Any:
        """Return the parameters as this worker last saw them, read-only; a first call pulls them.

        As what `step` returns: views where the worker shares memory with the shards. They hold
        still until the next round but one is applied, so the round's own gradient can still be
        computed from them after it was pushed.
        """
        if self._session.epoch < 0:
            return self.pull()
        self._check_open()
        return self._tree()

    def close(self) -> None:
        """Leave after a whole step; the rank stays free for a new worker."""
        if not self._closed:
            self._closed = True
            with suppress(DistNadamError):  # the optimizer is gone already
                self._session.leave()

    def _push(self, gradients: Any, *, want_parameters: bool) -> Ticket:
        self._settle()
        began = perf_counter()
        rejection = self._buffer.finish() if gradients is None else self._buffer.fill(gradients)
        push = self._session.prepare(self._buffer.parts, rejection, want_parameters=want_parameters)
        ticket = self._outstanding = Ticket(
            lambda: self._finish(push)
        )  # before it is sent: a Ctrl-C may leave it half sent
        self._session.send(push)
        if self._meter is not None:
            self._meter.push.add(perf_counter() - began)
        return ticket

    def _settle(self) -> None:
        """See the outstanding push through."""
        self._check_open()
        if self._outstanding is not None:
            self._outstanding.result()

    def _finish(self, push: InFlightPush) -> RoundResult:
        try:
            answers = self._session.wait_for(push)
        except StepTimeout:
            raise
        except DistNadamError:
            self._outstanding, self._session.epoch = (
                None,
                -1,
            )  # look again where the shards stand before the next push
            raise
        self._outstanding = None
        if self._meter is not None:
            self._moved().pushed += 1
        decided = self._take(answers)
        if decided.outcome == "refused":
            raise NonFiniteGradient(
                f"round {decided.round} was refused, no shard has moved: {decided.rejection}"
            )
        return decided

    def _moved(self) -> Traffic:
        """Return where this worker's pushes and pulls are counted while the shards are reached as
        they are now.
        """
        routes, flat = self._session.channel.routes, self._buffer.flat
        if self._traffic[0] is not routes or self._traffic[1] is not flat:
            traffic = (
                Traffic({}, {})
                if routes is None
                else Traffic.of(routes.ranges, routes.shared, flat)
            )
            self._traffic = (routes, flat, traffic)
            if self._meter is not None:
                self._meter.traffic.append(traffic)
        return self._traffic[2]

    def _take(self, answers: dict[int, RoundResult]) -> RoundResult:
        """Take over the parameters that answers brought."""
        for index, decided in answers.items():
            if decided.parameters is not None:
                self._views[0].fill(self._shards.ranges[index], decided.parameters)
        return answers[0]

    def _tree(self) -> Any:
        return self._views[0 if self._session.copies else self._session.buffer].tree()

    def _check_open(self) -> None:
        if self._closed:
            raise LifecycleError(f"worker {self.rank} was closed")
