"""A push that is not decided. Data only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distnadam.backends.base import Pending
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges


@dataclass
class Flight:
    """A push that is not decided: what it is, the answers now awaited, and the norms of its round once they are known.

    `parts` gives the gradients of each shard's ranges, which stay as they are until the flight ends, whatever the shards are by then.
    """

    epoch: int
    round: int
    parts: Callable[[list[Ranges]], Sequence[Flat]]
    complaint: str | None
    want_parameters: bool
    pending: Pending | None = None
    square_sums: Any = None
