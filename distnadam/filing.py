"""What callers say of files to a shard: plain records, carried out by its host beside the state machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reserve:
    """Asks for the memory that snapshots are taken into, so that they need not wait for it; always legal."""


@dataclass(frozen=True)
class Save:
    """Asks the held shard to write its state to one file; answered with the file's record.

    With `behind` the answer is None at once; the state is copied before it changes, then written, and `Collect` asks for its record.
    """

    token: str
    directory: str
    file_name: str
    behind: bool = False


@dataclass(frozen=True)
class Collect:
    """Asks for the record of a file that is written behind the training, once it is; always legal."""

    file_name: str


Filing = Reserve | Save | Collect
