"""One data-parallel worker: pushes its rank's gradients for each round, and sees the parameters between rounds. No maths, no Ray."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from distnadam.backends.base import Link, Pending
from distnadam.controller import Controller
from distnadam.errors import (
    DistNadamError,
    IllegalMessage,
    LifecycleError,
    NonFiniteGradient,
    Reconfigured,
    Rewound,
    ShardLost,
    ShardsDisagree,
    StepTimeout,
)
from distnadam.messages import Decided, Describe, Description, Join, Joined, Leave, Measured, Message, Norms, Pull, Push
from distnadam.nadam.norms import tensor_square_sums
from distnadam.takeover import adoptions
from distnadam.transport.parameters import ParameterView
from distnadam.transport.slot import GradientSlot

_T = TypeVar("_T")
_POLL_S = 0.02
_PATIENCE_S = 10.0
"""How long a shard may take to say where it stands, in seconds."""


class Ticket:
    """A push on its way; `result` waits until its round is decided."""

    def __init__(self, finish: Callable[[], Decided]) -> None:
        self._finish = finish
        self._decided: Decided | None = None
        self._error: DistNadamError | None = None

    def result(self) -> int:
        """Return the number of steps applied once the round is decided.

        Raises:
            NonFiniteGradient: a worker's gradient was not finite and the round was refused; no shard has moved.
            StaleEpoch: the state was replaced meanwhile; pull and compute again.
            Rewound: (a StaleEpoch) a shard died and all went back to round `error.step`; pull and compute again from there.
            StepTimeout: the other workers did not push, or a shard did not answer, in time; the message names them. May be called again.
            WorkerLost: another rank's worker died before it pushed, and nobody took it over; this push was dropped.
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


@dataclass
class _Flight:
    """A push that is not decided: what it is, the answers now awaited, and the norms of its round once they are known."""

    epoch: int
    round: int
    complaint: str | None
    want_parameters: bool
    pending: Pending | None = None
    square_sums: Any = None


class Worker:
    """One rank of a data-parallel run; made by `DistNadam.worker`. Not for use by two threads at once.

    What `pull` and `step` return is read-only, owned by the worker, and good until its next call; copy to keep. A pickled worker
    becomes, where it is unpickled, a new worker that takes the rank over.
    """

    def __init__(self, shards: Controller, rank: int) -> None:
        self.rank = rank
        self._shards, self._backend, self._layout, self._ranges = shards, shards.backend, shards.layout, shards.ranges
        self._timeout_s = shards.options.step_timeout_s
        self._epoch = self._round = -1
        self._buffer = 0
        self._outstanding: Ticket | None = None
        self._closed = False
        self._incarnation = self._join()

    @cached_property
    def _link(self) -> Link:
        """Made at first use, so that a worker which only travels to another process takes no memory here."""
        return self._backend.link(self._layout, self._ranges, self.rank, self._incarnation)

    @cached_property
    def _slot(self) -> GradientSlot:
        check = self._shards.options.check_gradients
        return GradientSlot(self._layout, self._ranges, f"worker {self.rank}", self._link.gradients, check=check)

    @cached_property
    def _copies(self) -> bool:
        return self._link.parameters is None

    @cached_property
    def _views(self) -> list[ParameterView]:
        shared = self._link.parameters
        return [ParameterView(self._layout)] if shared is None else [ParameterView(self._layout, flat) for flat in shared]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._backend.name == "local":
            raise LifecycleError("a local optimizer's worker lives in its process and cannot be pickled; use backend='ray' to share it")
        return Worker, (self._shards, self.rank)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def round(self) -> int:
        """Rounds decided when this worker last looked; its next push is for the one after, and batches follow it."""
        if self._epoch < 0:
            self._pull(want_parameters=False)
        return self._round

    def pull(self) -> Any:
        """Return the present parameters in the structure given to `build`, each in its own dtype, once this worker's push is decided."""
        self._settle()
        self._pull(want_parameters=True)
        return self._tree()

    def push(self, gradients: Any = None) -> Ticket:
        """Send this rank's gradients for the next round and return at once; the ticket's `result` waits for the round.

        Args:
            gradients: a tree like the one given to `build`, of floating-point arrays of the same shapes; they may be reused at once.
                Where all of them come in one half precision, half the bytes are moved, and summed in float32. None: what was written
                into the views of `gradients()`, or given tensor by tensor to `push_tensor`.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's, or was not pushed; nothing was sent.
            LifecycleError: there is nothing to send.
        """
        return self._push(gradients, want_parameters=False)

    def step(self, gradients: Any = None) -> Any:
        """Push this rank's gradients, wait until every rank's are averaged and applied, and return the new parameters.

        Args:
            gradients: as `push` takes them.

        Raises:
            StructureError, LifecycleError: as `push`.
            NonFiniteGradient, StaleEpoch, Rewound, StepTimeout, WorkerLost, Unrecoverable: as `Ticket.result`.
        """
        self._push(gradients, want_parameters=True).result()
        return self._tree()

    def push_tensor(self, path: str, gradient: Any) -> None:
        """Take one tensor's gradient as the backward pass yields it; `push()` or `step()` with no argument sends them once all came.

        Args:
            path: the tensor's place in the tree given to `build`, such as ``"layers/0/kernel"``.
            gradient: a floating-point array of its shape; it may be reused at once.

        Raises:
            StructureError: no such tensor, given twice, or of another shape or kind of dtype.
        """
        self._settle()
        self._slot.put(path, gradient)

    def gradients(self, dtype: str | None = None) -> Any:
        """Return this worker's slot as writable views in the structure given to `build`; `push()` or `step()` sends what they hold.

        With several processes on a machine the views lie in memory that the shards read, so nothing is copied. They are the caller's to
        write between a call that ended a round (`step`, `pull`, `Ticket.result`) and the next push, and stay good for the worker's life.

        Args:
            dtype: None for float32 (float64 where the parameter is), or "float16" or "bfloat16" for half the bytes.
        """
        self._settle()
        return self._slot.lend(dtype)

    def parameters(self) -> Any:
        """Return the parameters as this worker last saw them, read-only; a first call pulls them.

        As what `step` returns: views where the worker shares memory with the shards. They hold still until the next round but one is
        applied, so the round's own gradient can still be computed from them after it was pushed.
        """
        if self._epoch < 0:
            return self.pull()
        self._check_open()
        return self._tree()

    def close(self) -> None:
        """Leave after a whole step; the rank stays free for a new worker."""
        if not self._closed:
            self._closed = True
            try:
                self._ask(self._everyone(Leave(self.rank, self._incarnation)))
            except DistNadamError:
                return  # the optimizer is gone already
            finally:
                if "_link" in self.__dict__:
                    self._link.close()

    def _join(self) -> int:
        """Take the rank over on every shard, and see a predecessor's push through where some shard has counted it."""
        return self._recovering(self._join_once)

    def _join_once(self) -> int:
        answers: dict[int, Joined] = self._ask({0: Join(self.rank)})
        incarnation = answers[0].incarnation
        answers |= self._ask({i: Join(self.rank, incarnation) for i in range(1, len(self._ranges))})
        try:
            self._ask(dict(adoptions(self.rank, answers)))
        except IllegalMessage as error:
            self._backend.report_stuck()
            raise ShardLost(f"{error}; all shards must go back") from error
        if not answers[0].member:
            self._await_admission()
        return incarnation

    def _await_admission(self) -> None:
        """Wait until the supervisor has made this rank a member again, at a boundary of its choice."""
        deadline = time.monotonic() + self._timeout_s
        while self.rank not in self._ask({0: Describe()})[0].members:
            if time.monotonic() > deadline:
                raise StepTimeout(f"worker {self.rank}: was not admitted as a member in {self._timeout_s:g} s")
            time.sleep(_POLL_S)

    def _pull(self, *, want_parameters: bool) -> Decided:
        """Ask every shard where it stands until all stand at one round, and take that as this worker's place."""
        return self._recovering(lambda: self._pull_once(want_parameters))

    def _pull_once(self, want_parameters: bool) -> Decided:
        at_least = 0
        while True:
            answers = self._ask(self._everyone(Pull(self.rank, self._incarnation, at_least, want_parameters and self._copies)))
            at_least = max(d.round for d in answers.values())
            if all(d.round == at_least for d in answers.values()):
                return self._take(answers)

    def _push(self, gradients: Any, *, want_parameters: bool) -> Ticket:
        self._settle()
        if self._epoch < 0:
            self._pull(want_parameters=False)
        complaint = self._slot.finish() if gradients is None else self._slot.fill(gradients)
        flight = _Flight(self._epoch, self._round + 1, complaint, want_parameters)
        self._outstanding = Ticket(lambda: self._finish(flight))
        try:
            self._send(flight)
        except ShardLost:
            flight.pending = None  # sent again when it is waited for
        return self._outstanding

    def _send(self, flight: _Flight) -> None:
        """Send what the slot holds to every shard; a shard that has counted it already says so."""
        key, want = (flight.epoch, self.rank, self._incarnation, flight.round), flight.want_parameters and self._copies
        parts, told = self._slot.parts(), flight.complaint
        flight.pending = self._link.post({i: Push(*key, None if told else part, told, want) for i, part in enumerate(parts)})

    def _settle(self) -> None:
        """See the outstanding push through."""
        self._check_open()
        if self._outstanding is not None:
            self._outstanding.result()

    def _finish(self, flight: _Flight) -> Decided:
        """See a push through, whatever dies meanwhile, unless the state it was computed from is gone."""
        try:
            answers = self._see_through(flight)
        except StepTimeout:
            raise
        except DistNadamError:
            self._outstanding, self._epoch = None, -1  # look again where the shards stand before the next push
            raise
        self._outstanding = None
        decided = self._take(answers)
        if decided.outcome == "refused":
            raise NonFiniteGradient(f"round {decided.round} was refused, no shard has moved: {decided.complaint}")
        return decided

    def _see_through(self, flight: _Flight) -> dict[int, Decided]:
        while True:
            try:
                if flight.pending is None:
                    self._send(flight)
                return self._conclude(flight)
            except Reconfigured as error:
                if error.epoch <= flight.epoch:
                    time.sleep(_POLL_S)  # other shards are yet to hear of it
                flight.epoch, flight.pending = max(flight.epoch, error.epoch), None
                self._rejoin(wait=False)
            except ShardLost:
                flight.pending = None
                self._rejoin(wait=True)

    def _conclude(self, flight: _Flight) -> dict[int, Decided]:
        """Wait for the answers, the second phase included where clipping needs norms."""
        assert flight.pending is not None
        answers = self._wait(flight.pending)
        while measured := {shard: answer.sums for shard, answer in answers.items() if isinstance(answer, Measured)}:
            if len(measured) == len(answers):
                flight.square_sums = tensor_square_sums(len(self._layout.tensors), [measured[shard] for shard in sorted(measured)])
            if flight.square_sums is None:
                self._backend.report_stuck()
                raise ShardLost(f"worker {self.rank}: the norms of round {flight.round} went with a shard; all must go back")
            want = flight.want_parameters and self._copies
            norms = Norms(flight.epoch, self.rank, self._incarnation, flight.round, flight.square_sums, want)
            flight.pending = self._link.post(dict.fromkeys(measured, norms))
            answers = answers | self._wait(flight.pending)
        return answers

    def _rejoin(self, *, wait: bool) -> None:
        """Reach the shards where they are now, after waiting for a dead one's successor, and be known to them."""
        if wait:
            self._backend.await_recovery(self._timeout_s)

        def join() -> None:
            self._ask(self._everyone(Join(self.rank, self._incarnation)))

        self._recovering(join)
        if "_link" in self.__dict__:
            self._link.reconnect()
        for name in ("_copies", "_views"):
            self.__dict__.pop(name, None)

    def _recovering(self, work: Callable[[], _T]) -> _T:
        """Do what may be done again from its beginning, as often as shards die meanwhile."""
        while True:
            try:
                return work()
            except ShardLost:
                self._backend.await_recovery(self._timeout_s)
            except Rewound:
                continue  # it waited while the shards went back, and asks again

    def _take(self, answers: dict[int, Decided]) -> Decided:
        first = answers[0]
        for index, other in answers.items():
            if (other.round, other.outcome, other.lr, other.buffer) != (first.round, first.outcome, first.lr, first.buffer):
                raise ShardsDisagree(
                    f"shard 0 {first.outcome} round {first.round} with lr={first.lr!r}, shard {index} {other.outcome} round {other.round}"
                    f" with lr={other.lr!r}; a learning-rate function must give every shard the same rate for the same step"
                )
        self._epoch, self._round, self._buffer = first.epoch, first.round, first.buffer
        for index, decided in answers.items():
            if decided.parameters is not None:
                self._views[0].fill(self._ranges[index], decided.parameters)
        return first

    def _tree(self) -> Any:
        return self._views[0 if self._copies else self._buffer].tree()

    def _check_open(self) -> None:
        if self._closed:
            raise LifecycleError(f"worker {self.rank} was closed")

    def _everyone(self, message: Message) -> dict[int, Message]:
        return dict.fromkeys(range(len(self._ranges)), message)

    def _ask(self, messages: dict[int, Message]) -> dict[int, Any]:
        return self._wait(self._backend.post(messages)) if messages else {}

    def _wait(self, pending: Pending) -> dict[int, Any]:
        try:
            return pending.result(self._timeout_s)
        except TimeoutError as error:
            told = f"worker {self.rank}: round {self._round + 1} was not decided in {self._timeout_s:g} s"
            raise StepTimeout(f"{told}; {self._who_is_late()}") from error

    def _who_is_late(self) -> str:
        asked = {shard: self._backend.post({shard: Describe()}) for shard in range(len(self._ranges))}
        deadline, missing, silent = time.monotonic() + _PATIENCE_S, set(), []
        for shard, pending in asked.items():
            try:
                status: Description = pending.result(max(0.1, deadline - time.monotonic()))[shard]
            except TimeoutError:
                silent.append(shard)
                continue
            if status.round > self._round:
                continue
            fates = dict.fromkeys(status.left, " (closed)") | dict.fromkeys(status.dead, " (died)")
            missing |= {f"{rank}{fates.get(rank, '')}" for rank in status.waiting_for}
        hung = f"shards {', '.join(map(str, silent))} do not answer; " if silent else ""
        return f"{hung}still to push: ranks {', '.join(sorted(missing)) or 'none'}"
