"""One data-parallel worker: pushes its rank's gradients for each round, and sees the parameters between rounds. No maths, no Ray."""

from collections.abc import Callable
from typing import Any

from distnadam.backends.base import Pending
from distnadam.controller import Controller
from distnadam.errors import DistNadamError, IllegalMessage, LifecycleError, NonFiniteGradient, ShardsDisagree, StepTimeout
from distnadam.messages import Decided, Describe, Join, Joined, Leave, Measured, Message, Norms, Pull, Push
from distnadam.nadam.norms import tensor_square_sums
from distnadam.transport.parameters import ParameterView
from distnadam.transport.slot import GradientSlot


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
            StepTimeout: the other workers did not push in time; the message names their ranks.
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
    """One rank of a data-parallel run; made by `DistNadam.worker`. Not for use by two threads at once.

    What `pull` and `step` return is read-only, owned by the worker, and good until its next call; copy to keep. A pickled worker
    becomes, where it is unpickled, a new worker that takes the rank over.
    """

    def __init__(self, shards: Controller, rank: int) -> None:
        self.rank = rank
        self._shards, self._backend, self._layout, self._ranges = shards, shards.backend, shards.layout, shards.ranges
        self._timeout_s, layout = shards.timeout_s, shards.layout
        self._slot = GradientSlot(layout, f"worker {rank}")
        shared = shards.backend.parameters
        self._views = [ParameterView(layout, flat) for flat in shared] if shared is not None else [ParameterView(layout)]
        self._copies = shared is None
        self._epoch = self._round = -1
        self._outstanding: Ticket | None = None
        self._closed = False
        self._incarnation = self._join()

    def __reduce__(self) -> tuple[Any, ...]:
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
        self._check_open()
        if self._outstanding is not None:
            self._outstanding.result()
        return self._tree(self._pull(want_parameters=True))

    def push(self, gradients: Any) -> Ticket:
        """Send this rank's gradients for the next round and return at once; the ticket's `result` waits for the round.

        Args:
            gradients: a tree like the one given to `build`, of floating-point arrays of the same shapes.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's; nothing was sent.
        """
        return self._push(gradients, want_parameters=False)

    def step(self, gradients: Any) -> Any:
        """Push this rank's gradients, wait until every rank's are averaged and applied, and return the new parameters.

        Raises:
            StructureError: as `push`.
            NonFiniteGradient, StaleEpoch, StepTimeout: as `Ticket.result`.
        """
        ticket = self._push(gradients, want_parameters=True)
        ticket.result()
        assert ticket._decided is not None
        return self._tree(ticket._decided)

    def close(self) -> None:
        """Leave after a whole step; the rank stays free for a new worker."""
        if not self._closed:
            self._closed = True
            try:
                self._ask(self._everyone(Leave(self.rank, self._incarnation)))
            except DistNadamError:
                return  # the optimizer is gone already

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
        self._check_open()
        if self._outstanding is not None:
            self._outstanding.result()
        if self._epoch < 0:
            self._pull(want_parameters=False)
        complaint = self._slot.fill(gradients)
        want = want_parameters and self._copies
        key = (self._epoch, self.rank, self._incarnation, self._round + 1)
        parts = [None if complaint else self._slot.ranges(ranges) for ranges in self._ranges]
        pending = self._backend.post({i: Push(*key, part, complaint, want) for i, part in enumerate(parts)})
        self._outstanding = Ticket(lambda: self._finish(pending, key, want))
        return self._outstanding

    def _finish(self, pending: Pending, key: tuple[int, int, int, int], want: bool) -> Decided:
        """See a push through, the second phase included where clipping needs norms."""
        try:
            answers = self._wait(pending)
            sums = [answer.sums for _, answer in sorted(answers.items()) if isinstance(answer, Measured)]
            if sums and len(sums) < len(answers):
                raise IllegalMessage(f"worker {self.rank}: round {key[-1]}: {len(sums)} of {len(answers)} shards have measured norms only")
            if sums:
                answers = self._ask(self._everyone(Norms(*key, tensor_square_sums(len(self._layout.tensors), sums), want)))
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
            if (other.round, other.outcome, other.lr) != (first.round, first.outcome, first.lr):
                raise ShardsDisagree(
                    f"shard 0 {first.outcome} round {first.round} with lr={first.lr!r}, shard {index} {other.outcome} round {other.round}"
                    f" with lr={other.lr!r}; a learning-rate function must give every shard the same rate for the same step"
                )
        self._epoch, self._round = first.epoch, first.round
        for index, decided in answers.items():
            if decided.parameters is not None:
                self._views[0].fill(self._ranges[index], decided.parameters)
        return first

    def _tree(self, decided: Decided) -> Any:
        return self._views[0 if self._copies else decided.buffer].tree()

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
            status = self._backend.post({0: Describe()}).result(10.0)[0]
            missing = ", ".join(str(r) + (" (closed)" if r in status.left else "") for r in status.waiting_for) or "none"
            raise StepTimeout(
                f"worker {self.rank}: round {self._round + 1} was not decided in {self._timeout_s:g} s; still to push: ranks {missing}"
            ) from error
