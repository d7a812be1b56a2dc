"""`python -m tests.hosts.strangers JSON` connects to ports of shards, and says what strangers say.

It prints how many connections are left, once no more are than the shards may keep or a while has
passed, and holds them until its standard input ends.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from tests.hosts.program import say

_SETTLED_S = 0.5
_WAIT_S = 30.0
"""Seconds that a shard may take to hang up, which has few of them on a machine with much to do."""
_HALF = (1024).to_bytes(4, "little") + bytes(500)


def main(about: dict[str, Any]) -> None:
    """Run the command."""
    said = {"silence": b"", "half": _HALF, "garbage": os.urandom(3000)}[about["how"]]
    held = []
    for _ in range(about["each"]):
        for address, port in about["targets"]:
            with suppress(OSError):  # the shard is being replaced, or has hung up on us
                sock = socket.create_connection((address, port), 5.0)
                held.append(sock)
                sock.sendall(said)
    deadline = time.monotonic() + _WAIT_S
    time.sleep(_SETTLED_S)
    while (left := sum(map(_is_open, held))) > about["most"] and time.monotonic() < deadline:
        time.sleep(_SETTLED_S)
    say(left=left)
    sys.stdin.read()


def _is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
