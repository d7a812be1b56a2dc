"""Which checkpoint, as one process tells it another."""

from typing import NamedTuple


class CheckpointId(NamedTuple):
    """The place of a checkpoint's directory, and its save's id: another save of the same round
    replaces it.
    """

    place: str
    save_id: str
