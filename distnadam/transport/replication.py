"""The seam by which a primary replicates to its standby.

It is implemented on one machine by `shm_replication`, between hosts by `tcp_replication`, and by
Ray's objects where no port can be reached.
"""

from abc import ABC, abstractmethod

from distnadam.protocol.supervisor_messages import Record
from distnadam.tensors.arrays import Flat


class ReplicationStream(ABC):
    """A primary's way to its standby.

    `mean` is where the coming round's mean gradient is written, None where the standby needs none;
    `reached` is the last round that the standby has.
    """

    mean: Flat | None = None
    reached: int

    @abstractmethod
    def ready(self) -> bool:
        """Wait until `mean` may be written, and the standby can take one more round; return False
        if it died or is too slow.
        """

    @abstractmethod
    def send(self, record: Record) -> bool:
        """Deliver a record; return False if the standby died or does not read."""

    @abstractmethod
    def close(self) -> None:
        """Tell the standby that it is out of date from now on, and release it.

        The end of its primary's process alone would make it take over.
        """
