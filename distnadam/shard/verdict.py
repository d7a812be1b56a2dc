"""Whether a round may be stepped, as what its pushes say beside their gradients decides. Pure.

The one place where ranks' settings are compared: once all pushes are in and in rank order, so that
neither the verdict nor its text depends on which came first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from distnadam.nadam.step_overrides import overrides_in_words
from distnadam.protocol.messages import Outcome
from distnadam.protocol.round_settings import RoundSettings, absent_in

Verdict = tuple[Outcome, str]
"""How a round ends without a step, and why."""

_MUST_AGREE: dict[str, Callable[[Any], str]] = {
    "micro_steps": repr,
    "overrides": overrides_in_words,
}
"""The settings that all ranks of a round must have alike, and how their values are said."""


class Judged(Protocol):
    """A push, as far as it is judged."""

    @property
    def settings(self) -> RoundSettings:
        """What its rank says of the round."""

    @property
    def rejection(self) -> str | None:
        """Why its gradients cannot be used, if so."""


def verdict_of(
    pushes: Mapping[int, Judged], on_nonfinite: Literal["raise", "skip"], num_trained: int
) -> Verdict | None:
    """Return how a round with all its pushes ends without a step; None if it is to be stepped.

    `num_trained` is the number of tensors that are not frozen.

    A statement must be that of all ranks. A vote of one rank (`found_inf`) skips the round,
    whatever else the pushes say; settings that differ refuse it before any gradient is judged.
    """
    ranks = sorted(pushes)
    statements = [pushes[rank].settings.statement for rank in ranks]
    if any(what != statements[0] for what in statements):
        pairs = zip(ranks, statements, strict=True)
        each = ", ".join(f"rank {rank} changed {what or 'nothing'}" for rank, what in pairs)
        return "disagreed", f"all ranks must change the same between two steps: {each}"
    voted = [rank for rank in ranks if pushes[rank].settings.found_inf]
    if voted:
        return "voted", _joined(pushes, voted)
    for name, said in _MUST_AGREE.items():
        given = [getattr(pushes[rank].settings, name) for rank in ranks]
        if any(value != given[0] for value in given):
            each = ", ".join(f"rank {r} has {said(v)}" for r, v in zip(ranks, given, strict=True))
            return "disagreed", f"{name} must be equal on all ranks: {each}"
    if statements[0]:
        return "voted", f"all ranks have changed {statements[0]}"
    rejected = [rank for rank in ranks if pushes[rank].rejection is not None]
    if rejected:
        return not_finite(_joined(pushes, rejected), on_nonfinite)
    absent = absent_in(push.settings for push in pushes.values())
    return ("empty", "no rank has a gradient") if 0 < num_trained == len(absent) else None


def not_finite(why: str, on_nonfinite: Literal["raise", "skip"]) -> Verdict:
    """Return how a round ends whose gradients are not finite."""
    return "skipped" if on_nonfinite == "skip" else "refused", why


def _joined(pushes: Mapping[int, Judged], ranks: Sequence[int]) -> str:
    return "; ".join(pushes[rank].rejection or f"rank {rank}: found_inf" for rank in ranks)
