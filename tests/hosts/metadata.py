"""`python -m tests.hosts.metadata` plays a cloud's metadata service on a host: nothing is announced
until a line comes on standard input, and then the host is taken away.
"""

import json
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from tests.hosts.program import say

_LEFT_S = 120
NAME = "machine-3"


class Metadata(BaseHTTPRequestHandler):
    """The paths of AWS, with a token that ends, of GCP and of Azure, with their headers; what lacks
    these is refused, and others are 404.
    """

    announced = threading.Event()
    tokens: ClassVar[dict[str, float]] = {}
    """When each token ends."""

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token":
            self._answer(404)
        elif not asked.isdecimal() or not 1 <= int(asked) <= 21600:
            self._answer(400)
        else:
            token = secrets.token_urlsafe()
            self.tokens[token] = time.monotonic() + int(asked)
            self._answer(200, token)

    def do_GET(self) -> None:
        is_announced, ends = self.announced.is_set(), datetime.now(UTC) + timedelta(seconds=_LEFT_S)
        token = self.headers.get("X-aws-ec2-metadata-token", "")
        if self.path.startswith("/latest/"):
            knows = self.tokens.get(token, 0.0) > time.monotonic()
            action = {"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
            found = is_announced and self.path == "/latest/meta-data/spot/instance-action"
            self._answer(401 if not knows else 200 if found else 404, json.dumps(action))
        elif self.path.startswith("/computeMetadata/v1/instance/"):
            knows = self.headers.get("Metadata-Flavor") == "Google"
            said = {"preempted": str(is_announced).upper(), "maintenance-event": "NONE"}
            answer = said.get(self.path.rpartition("/")[2])
            self._answer(403 if not knows else 404 if answer is None else 200, answer or "")
        elif self.path.startswith("/metadata/") and "?api-version=" in self.path:
            knows = self.headers.get("Metadata") == "true"
            if self.path.startswith("/metadata/instance/compute/name?"):
                answer = NAME
            else:
                answer = json.dumps(
                    {"DocumentIncarnation": 1, "Events": _events(is_announced, ends)}
                )
            self._answer(200 if knows else 400, answer)
        else:
            self._answer(404)

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode() if status == 200 else b"")

    def log_message(self, *args: Any) -> None:
        pass


def _events(is_announced: bool, ends: datetime) -> list[dict[str, Any]]:
    """Azure's events: another machine of the scale set is always about to go."""
    at = ends.strftime("%a, %d %b %Y %H:%M:%S GMT")
    names = ["machine-1", *([NAME] if is_announced else [])]
    return [
        {"EventId": name, "EventType": kind, "Resources": [name], "NotBefore": at}
        for name in names
        for kind in ("Freeze", "Preempt")
    ]


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(metadata=f"http://127.0.0.1:{server.server_port}")
    input()
    Metadata.announced.set()
    say(announced=True)
    input()


if __name__ == "__main__":
    main()
