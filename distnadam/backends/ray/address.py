"""Where a process of an optimizer runs."""

from dataclasses import dataclass

from distnadam.transport.unix_connection import Address


@dataclass(frozen=True)
class ProcessAddress:
    """Where a process of an optimizer runs.

    Args:
        node: the id of its Ray node; "" if nobody knows.
        socket: where it listens for channels over shared memory; None if it does not.
        reason: why it does not, for the user.
        pid: its process id; 0 if nobody knows.
        born: its start time, which tells it from another process of that id.
    """

    node: str
    socket: Address | None = None
    reason: str | None = None
    pid: int = 0
    born: str = ""


@dataclass(frozen=True, kw_only=True)
class Relayed:
    """Where workers of a node reach a shard of another.

    Attributes:
        socket: the relay's.
        by_tcp: whether the relay reaches the shard by TCP; else by Ray objects.
    """

    socket: Address
    by_tcp: bool
