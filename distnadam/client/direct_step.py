"""Steps from an already averaged gradient, which no worker pushes: one step each, however often it
is sent.
"""

import itertools
import secrets
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from distnadam.backends.base import Backend
from distnadam.client.answers import shards_disagree
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.config import Options
from distnadam.errors import IllegalMessage, PushesPending, RoundMismatch, StepTimeout
from distnadam.nadam.norms import tensor_square_sums
from distnadam.protocol.messages import (
    Message,
    Outcome,
    PartialNorms,
    Paused,
    RoundResult,
    Step,
    StepNorms,
)
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.shard.ledger import DIRECT, Ledger
from distnadam.shield import await_unlocked
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from distnadam.threads import renew_after_fork

DIRECT_CALL = "apply_gradients"
"""The user's call, for errors and logs."""
_SMALL = 1 << 16
"""Elements below which a step costs its messages rather than its bytes."""
_OWN_BITS, _COUNT_BITS = 40, 22
"""Of an incarnation: the handle's own number, and that of its step; together below 2**63."""


@dataclass
class DirectStep:
    """One direct step: its incarnation, which no other has, its round, and its norms once they are
    known; `settings` go with it. `loss_scale` is that of the round that it was first meant for, by
    which its gradients are divided; None before that, and 0 for none.

    `incarnation` is 0 before it was sent, and `round` also after a shard has refused it.
    """

    incarnation: int = 0
    round: int = 0
    square_sums: Any = None
    settings: RoundSettings = ORDINARY
    loss_scale: float | None = None

    def is_counted(self, paused: Paused) -> bool:
        """Whether a shard that stands there counts it; the others can get it only from here."""
        return Ledger.from_dict(paused.ledger).counted(DIRECT, self.incarnation, self.round)

    def choose_round(self, paused: Paused) -> None:
        """Take the next round at the first boundary; keep it later, unless others had it since.

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
            settings=self.settings,
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
    """The direct steps of one handle, one at a time: their numbers, the memory of their gradients,
    and where the last one left the shards.

    A step's incarnation is the handle's own number, drawn at random, and how many steps it made
    before: so no two steps ever have the same, whoever makes them and whatever the shards forget.

    Args:
        shards: the shards.
    """

    def __init__(self, shards: Stepped) -> None:
        self._shards = shards
        self._buffer: GradientBuffer | None = None
        # to be sent again, where the shard refuses a step that does not hold it
        self._is_cheap = (
            shards.layout.num_elements < _SMALL or shards.backend.transport.written_here is not None
        )
        self._num_trained = len(shards.layout.tensors) - len(shards.layout.frozen)
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Be another handle than the parent's."""
        self._lock = threading.Lock()
        self._numbers = itertools.count(secrets.randbits(_OWN_BITS) << _COUNT_BITS)
        self._last: RoundResult | None = None  # where a step has left the shards

    def apply(self, step: DirectStep, gradients: Any) -> RoundResult:
        """Have all shards take a step from a gradient tree; the same one again completes it.

        An only shard, of a small model or of this process, that stands where the last step has left
        it, and does not clip by norm, is not held for it.

        Raises:
            PushesPending: workers' pushes wait.
            StepTimeout: another thread's step was not done in time.
        """
        timeout_s = self._shards.options.step_timeout_s
        if self._lock.locked() and not await_unlocked(self._lock.locked, timeout_s):
            raise StepTimeout(f"{DIRECT_CALL}: another step was not done in {timeout_s:g} s")
        with self._lock:
            try:
                return self._follow(step, gradients) or self._hold(step, gradients)
            finally:
                if self._buffer is not None:
                    self._buffer.release()

    def _hold(self, step: DirectStep, gradients: Any) -> RoundResult:
        with self._shards.boundary(step) as at:
            step.choose_round(at.held)
            if step.loss_scale is None:
                step.loss_scale = at.held.loss_scale.scale if at.held.loss_scale else 0.0
            rejection, parts = self._take(step, gradients, self._shards.ranges)
            step.incarnation = step.incarnation or next(self._numbers)
            # while the shards are held: a child forked meanwhile refuses to go on from them
            with self._shards.backend.transport.unseen() as in_place:
                messages = {
                    i: step.message(at.token, part, rejection, in_place=in_place)
                    for i, part in enumerate(parts)
                }
                return self._apply(step, at.token, messages)

    def _follow(self, step: DirectStep, gradients: Any) -> RoundResult | None:
        """Step an only shard without a hold; None if it is not to be stepped so, or refuses."""
        last, ranges = self._last, self._shards.ranges
        if last is None or not self._is_cheap or len(ranges) > 1:
            return None
        self._last = None
        is_new, settings = step.round == 0, step.settings
        if is_new:
            step.round = last.round + 1
            step.loss_scale = last.loss_scale
        rejection, parts = self._take(step, gradients, ranges)
        step.incarnation = step.incarnation or next(self._numbers)
        try:
            with self._shards.backend.transport.unseen() as in_place:
                message = step.message(
                    None, parts[0], rejection, in_place=in_place, epoch=last.epoch
                )
                return self._apply(step, None, {0: message})
        except (IllegalMessage, RoundMismatch):  # somebody else acts too
            if is_new:  # no shard has taken it, so it may be of any round
                step.round, step.loss_scale, step.settings = 0, None, settings
            return None

    def _apply(
        self, step: DirectStep, token: str | None, messages: Mapping[int, Step]
    ) -> RoundResult:
        transport = self._shards.backend.transport
        try:
            if token is None and (at_once := transport.step_at_once(messages[0])) is not None:
                self._last = at_once
                return at_once
            answers: dict[int, Any] = self._shards.ask(messages, who=DIRECT_CALL)
            is_measured = any(isinstance(answer, PartialNorms) for answer in answers.values())
            if is_measured:
                answers = self._give_norms(step, token, answers)
        except BaseException:
            transport.await_work()  # it may read what was lent
            raise
        decided: RoundResult = answers[0]
        for index, other in answers.items():
            if (other.lr, other.revision) != (decided.lr, decided.revision):
                raise shards_disagree(decided, index, other)
        self._last = None if is_measured else decided
        if decided.round == step.round:
            return decided
        # it was counted long ago, and the answer is of the last of others' rounds since
        why = messages[0].rejection
        if step.square_sums is not None and not np.isfinite(step.square_sums).all():
            why = f"the norm of the mean gradient of round {step.round} overflows"
        is_skip = self._shards.options.on_nonfinite == "skip"
        outcome: Outcome = "applied" if why is None else "skipped" if is_skip else "refused"
        if step.settings.found_inf:
            outcome = "voted"
        elif why is None and 0 < len(step.settings.absent) == self._num_trained:
            outcome = "empty"
        return replace(decided, outcome=outcome, rejection=why)

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

    def _take(
        self, step: DirectStep, gradients: Any, ranges: list[Ranges]
    ) -> tuple[str | None, list[Flat]]:
        """Return why a gradient tree cannot be used, or None, and each shard's part of it: in this
        handle's buffer, or where it lies if the shards read this process's memory.
        """
        shards = self._shards
        if self._buffer is None:
            memory = empty_flat(shards.layout.sizes)
            self._buffer = GradientBuffer(
                shards.layout,
                DIRECT_CALL,
                memory,
                check=shards.options.check_gradients,
                compiled=shards.options.kernel != "numpy",
            )
        if step.settings.found_inf:
            return self._buffer.overflowed(), self._buffer.parts(ranges)
        self._buffer.loss_scale = step.loss_scale or 0.0
        if (written := shards.backend.transport.written_here) is None:
            rejection = self._buffer.fill(gradients)
        else:
            rejection = self._buffer.borrow(gradients, written)
        if self._buffer.absent:
            step.settings = replace(step.settings, absent=self._buffer.absent)
        if rejection is not None and step.loss_scale:
            step.settings = replace(step.settings, found_inf=True)
        return rejection, self._buffer.parts(ranges)
