"""Frames: a body behind its length, so that what a socket yields can be cut again.

Also the version of all that is sent.
"""

import struct
from typing import Any

from distnadam.errors import LaneError

HEADER = struct.Struct("<I")
"""The length of the body that follows."""

VERSION = 5
"""Of the frames, the handshakes and the records of this folder. Raise it with every change of one,
which `tests/protocol/test_version.py` notices.
"""

_MOST_BYTES = 1 << 30


def check_version(theirs: Any) -> None:
    """Raise LaneError for a peer that speaks another version of the protocol."""
    if theirs != VERSION:
        raise LaneError(
            f"expected version {VERSION} of the protocol, got {theirs!r:.50}: install the same "
            "distnadam on every host, and start again what ran before"
        )


def frame_of(body: bytes) -> bytes:
    """Return a frame: the body behind its length."""
    return HEADER.pack(len(body)) + body


class Frames:
    """Cuts what a socket yields into frames' bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes and return each body that is whole now; raise LaneError for a length that
        cannot be.
        """
        if not self._buffer and len(data) >= 4 and len(data) == 4 + HEADER.unpack_from(data)[0]:
            return [data[4:]]  # the usual case: one whole frame
        bodies: list[bytes] = []
        self._buffer += data
        while len(self._buffer) >= 4:
            size = HEADER.unpack_from(self._buffer)[0]
            if size > _MOST_BYTES:
                raise LaneError(
                    f"a frame of {size} bytes was announced, expected at most {_MOST_BYTES}"
                )
            if len(self._buffer) < 4 + size:
                break
            bodies.append(bytes(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
        return bodies
