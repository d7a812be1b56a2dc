"""Steps from an already averaged gradient, which no worker pushes: one step each, however often it
is sent.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from distnadam.backends.base import Backend
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.config import Options
from distnadam.errors import IllegalMessage, PushesPending, RoundMismatch
from distnadam.nadam.norms import tensor_square_sums
from distnadam.protocol.messages import Message, PartialNorms, Paused, RoundResult, Step, StepNorms
from distnadam.shard.ledger import DIRECT, Ledger
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges

_UNKNOWN = -1
DIRECT_CALL = "apply_gradients"
"""The user's call, for errors and logs."""


@dataclass
class DirectStep:
    """The incarnation and round of one direct step, and its norms once they are known.

    `round` is 0 before the first boundary.
    """

    incarnation: int = 0
    round: int = 0
    square_sums: Any = None

    def is_counted(self, paused: Paused) -> bool:
        """Whether a shard that stands there counts it; the others can get it only from here."""
        return Ledger.from_dict(paused.ledger).counted(DIRECT, self.incarnation, self.round)

    def follow(self, last: "DirectStep") -> None:
        """Take the round after another step's, as the step after it."""
        self.incarnation = last.incarnation + 1
        self.round = last.round + 1

    def choose_round(self, paused: Paused, own: int) -> None:
        """Take the next round at the first boundary; keep it later, unless workers had it since.

        The number after another handle's last step may be that of its next one, which is on its
        way without a hold, so it is left to it.

        Args:
            paused: where the shards stand.
            own: the incarnation of this handle's last step, 0 before the first; another number
                while it is not known whether a later one was taken.

        Raises:
            PushesPending: workers have pushed for that round.
        """
        if self.round and (self.round > paused.round or self.is_counted(paused)):
            return
        if paused.pending:
            ranks = ", ".join(map(str, paused.pending))
            raise PushesPending(
                f"ranks {ranks} have pushed for round {paused.round + 1}: their round must end "
                "first"
            )
        newest = dict(paused.ledger["newest"]).get(DIRECT, 0)
        self.incarnation = newest + (1 if newest == own else 2)
        self.round = paused.round + 1
        self.square_sums = None  # those of the round that it missed

    def message(
        self,
        token: str | None,
        gradients: Flat,
        rejection: str | None,
        *,
        in_place: bool = False,
        epoch: int = 0,
    ) -> Step:
        """Return the message for one shard; the arguments are those of `Step`."""
        return Step(
            token=token,
            incarnation=self.incarnation,
            round=self.round,
            gradients=None if rejection else gradients,
            rejection=rejection,
            in_place=in_place,
            epoch=epoch,
        )


class _Held(Protocol):
    """Where all shards stand while they are held, and by which token."""

    @property
    def token(self) -> str: ...
    @property
    def held(self) -> Paused: ...


class Stepped(Protocol):
    """The shards that are stepped."""

    backend: Backend
    layout: Layout
    options: Options

    @property
    def ranges(self) -> list[Ranges]:
        """What each shard holds."""

    def boundary(self, step: DirectStep) -> AbstractContextManager[_Held]:
        """Hold all shards after the same round."""

    def ask(self, messages: Mapping[int, Message], *, who: str | None = None) -> dict[int, Any]:
        """Send each shard its message and return the answers."""


class DirectSteps:
    """The direct steps of one handle: the memory of their gradients, and the last that was taken.

    Args:
        shards: the shards.
    """

    def __init__(self, shards: Stepped) -> None:
        self._shards = shards
        self._buffer: GradientBuffer | None = None
        self._last: tuple[DirectStep, int] | None = None  # and the epoch in which it was taken
        self._own = 0  # the last one's incarnation, unless a later one's end is not known

    def apply(self, step: DirectStep, gradients: Any) -> RoundResult:
        """Have all shards take a step from a gradient tree; the same one again completes it.

        An only shard that stands where the last step has left it is not held for it.

        Raises:
            PushesPending: workers' pushes wait.
        """
        if self._last is not None and len(self._shards.ranges) == 1:
            try:
                return self._follow(*self._last, step, gradients)
            except (IllegalMessage, RoundMismatch):
                pass  # somebody else acts too
        with self._shards.boundary(step) as at:
            step.choose_round(at.held, self._own)
            return self._apply(step, at.token, gradients)

    def _follow(
        self, last: DirectStep, epoch: int, step: DirectStep, gradients: Any
    ) -> RoundResult:
        is_new = step.round == 0
        if is_new:
            step.follow(last)
        try:
            return self._apply(step, None, gradients, epoch)
        except (IllegalMessage, RoundMismatch):
            if is_new:  # no shard has taken it, so it may be of any round
                step.round = 0
            self._own = last.incarnation
            raise

    def _apply(
        self, step: DirectStep, token: str | None, gradients: Any, epoch: int = 0
    ) -> RoundResult:
        rejection, parts = self._take(gradients)
        transport = self._shards.backend.transport
        in_place = transport.is_unseen
        messages = {
            i: step.message(token, part, rejection, in_place=in_place, epoch=epoch)
            for i, part in enumerate(parts)
        }
        self._last, self._own = None, _UNKNOWN
        try:
            answers = self._shards.ask(messages, who=DIRECT_CALL)
            is_measured = any(isinstance(answer, PartialNorms) for answer in answers.values())
            if is_measured:
                answers = self._give_norms(step, token, answers)
        except BaseException:
            transport.await_work()  # another thread's may read what was lent
            raise
        decided: RoundResult = answers[0]
        self._last = None if is_measured else (step, decided.epoch)
        self._own = step.incarnation
        return decided

    def _give_norms(
        self, step: DirectStep, token: str | None, answers: Mapping[int, Any]
    ) -> dict[int, Any]:
        """Carry out the second phase, in which the shards that measured get the whole norms."""
        if token is None:
            raise IllegalMessage("a shard that clips by norm must be held for a step")
        measured = {
            i: answer.sums
            for i, answer in sorted(answers.items())
            if isinstance(answer, PartialNorms)
        }
        if len(measured) == len(answers):
            num_tensors = len(self._shards.layout.tensors)
            step.square_sums = tensor_square_sums(num_tensors, list(measured.values()))
        norms = StepNorms(token, step.square_sums)
        return {**answers, **self._shards.ask(dict.fromkeys(measured, norms), who=DIRECT_CALL)}

    def _take(self, gradients: Any) -> tuple[str | None, list[Flat]]:
        """Return why a gradient tree cannot be used, or None, and each shard's part of it: in this
        handle's buffer, or where it lies if the shards read this process's memory.
        """
        shards = self._shards
        if self._buffer is None:
            memory = empty_flat(shards.layout.sizes)
            self._buffer = GradientBuffer(
                shards.layout, DIRECT_CALL, memory, check=shards.options.check_gradients
            )
        if (written := shards.backend.transport.written_here) is not None:
            return self._buffer.lend(gradients, shards.ranges, written)
        return self._buffer.fill(gradients), self._buffer.parts(shards.ranges)
