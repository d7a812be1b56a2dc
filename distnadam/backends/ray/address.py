"""Where a shard runs, and where its channel over shared memory is."""

from dataclasses import dataclass

from distnadam.transport.connection import Address


@dataclass(frozen=True)
class ProcessAddress:
    """Where a shard runs: its Ray node and process, and where its lanes are called, or why it has
    none.
    """

    node: str
    address: Address | None = None
    reason: str | None = None
    pid: int = 0
    born: str = ""
