"""`python -m tests.hosts.metadata` plays a cloud's metadata service on a host: nothing is announced
until a line comes on standard input, and then the host is taken away.
"""

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.hosts.program import say

TOKEN = "a token of the session"
_LEFT_S = 120


class Metadata(BaseHTTPRequestHandler):
    """AWS's paths with a token, and GCP's with their header; others are 404."""

    announced = threading.Event()

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(TOKEN if self.path == "/latest/api/token" and asked else None)

    def do_GET(self) -> None:
        knows = self.headers.get("X-aws-ec2-metadata-token") == TOKEN
        if self.path == "/latest/meta-data/spot/instance-action" and knows:
            ends = datetime.now(UTC) + timedelta(seconds=_LEFT_S)
            action = {"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
            self._answer(json.dumps(action) if self.announced.is_set() else None)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            flavoured = self.headers.get("Metadata-Flavor") == "Google"
            said = "TRUE" if self.announced.is_set() else "FALSE"
            self._answer(said if flavoured else None)
        else:
            self._answer(None)

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *args: Any) -> None:
        pass


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
