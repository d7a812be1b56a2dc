"""From old ranges to a new one: which pieces to copy from where. A plan, computed and checked
before any byte moves. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distnadam.errors import StructureError
from distnadam.tensors.layout import Ranges


@dataclass(frozen=True)
class Copy:
    """Elements [begin, end) of a space, which old shard `source` holds."""

    source: int
    space: str
    begin: int
    end: int


def copy_plan(old: Sequence[Ranges], new: Ranges) -> list[Copy]:
    """Return the pieces that make up one new shard's ranges, in order, each element once.

    Raises:
        StructureError: the old ranges hold an element of the new one twice, or not at all.
    """
    plan = []
    for space, (begin, end) in new.items():
        held = sorted(
            (ranges[space], source) for source, ranges in enumerate(old) if space in ranges
        )
        reached = begin
        for (low, high), source in held:
            low, high = max(low, begin), min(high, end)
            if low >= high:
                continue
            if low != reached:
                fault = "twice" if low < reached else "by none"
                raise StructureError(
                    f"old shards: {space} element {min(low, reached)} is held {fault}; expected "
                    "exactly once"
                )
            plan.append(Copy(source, space, low, high))
            reached = high
        if reached < end:
            raise StructureError(
                f"old shards: {space} element {reached} is held by none; expected exactly once"
            )
    return plan
