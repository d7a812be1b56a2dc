"""One data-parallel worker: pushes its rank's gradients for each round, and sees the parameters between rounds. No maths, no Ray."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distnadam.backends.base import Link, Pending
from distnadam.controller import Controller
from distnadam.errors import DistNadamError, IllegalMessage, LifecycleError, NonFiniteGradient, ShardsDisagree, StepTimeout
from distnadam.messages import Decided, Describe, Description, Join, Joined, Leave, Measured, Message, Norms, Pull, Push
from distnadam.nadam.norms import tensor_square_sums
from distnadam.transport.parameters import ParameterView
from distnadam.transport.slot import GradientSlot

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
            StepTimeout: the other workers did not push, or a shard did not answer, in time; the message names them. May be called again.
            WorkerLost: another rank's worker died before it pushed; this push was dropped.
            ShardLost: a shard's process died.
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
    """A push that is not decided: its (epoch, rank, incarnation, round), and the answers now awaited."""

    key: tuple[int, int, int, int]
    want_parameters: bool
    pending: Pending


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
            NonFiniteGradient, StaleEpoch, StepTimeout, WorkerLost, ShardLost: as `Ticket.result`.
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
        joined: Joined = self._ask({0: Join(self.rank)})[0]
        self._ask({i: Join(self.rank, joined.incarnation) for i in range(1, len(self._ranges))})
        return joined.incarnation

    def _pull(self, *, want_parameters: bool) -> Decided:
        """Ask every shard where it stands until all stand at one round, and take that as this worker's place."""
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
        want = want_parameters and self._copies
        key = (self._epoch, self.rank, self._incarnation, self._round + 1)
        parts = self._slot.parts()
        pending = self._link.post({i: Push(*key, None if complaint else part, complaint, want) for i, part in enumerate(parts)})
        flight = _Flight(key, want, pending)
        self._outstanding = Ticket(lambda: self._finish(flight))
        return self._outstanding

    def _settle(self) -> None:
        """See the outstanding push through."""
        self._check_open()
        if self._outstanding is not None:
            self._outstanding.result()

    def _finish(self, flight: _Flight) -> Decided:
        """See a push through, the second phase included where clipping needs norms."""
        try:
            answers = self._wait(flight.pending)
            sums = [answer.sums for _, answer in sorted(answers.items()) if isinstance(answer, Measured)]
            if sums and len(sums) < len(answers):
                told = f"worker {self.rank}: round {flight.key[-1]}: {len(sums)} of {len(answers)} shards have measured norms only"
                raise IllegalMessage(told)
            if sums:
                norms = Norms(*flight.key, tensor_square_sums(len(self._layout.tensors), sums), flight.want_parameters)
                flight.pending = self._link.post(dict.fromkeys(range(len(self._ranges)), norms))
                answers = self._wait(flight.pending)
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
