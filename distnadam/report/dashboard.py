"""Serves the page on a run while it goes on: to this host unless told otherwise, and by a token."""

import hmac
import json
import math
import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from typing_extensions import override

from distnadam.errors import ConfigError, TrainingError
from distnadam.report.data import read_run
from distnadam.report.page import page
from distnadam.threads import start
from distnadam.training.callbacks import Callback

_EVERY_S = 2.0
_SHARE = 50
"""Of the time, which reading the run's files may take."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Dashboard(Callback):
    """Serves the page on the run that it is given to, until the run ends.

    Args:
        host: the address to listen at.
        port: 0 means a free one.
        say: gets the URL of the page, with its token, once it is served.

    Raises:
        TrainingError: plotly is missing.

    Attributes:
        url: of the page, with its token, once it is served.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        say: Callable[[str], object] = lambda url: None,
    ) -> None:
        page([])  # says what is missing before the run begins
        self._place = host, port
        self._say = say
        self._server: ThreadingHTTPServer | None = None
        self.url: str | None = None

    @override
    def on_begin(self, step: int, steps: int) -> None:
        if self._server is not None:
            return
        host, port = self._place
        token = secrets.token_urlsafe(24)
        try:
            self._server = _Server((host, port), self.run.directory, token)
        except OSError as error:
            raise TrainingError(
                f"dashboard: cannot listen at {host}:{port}: {error.strerror or error}; give "
                "--dashboard another port, or none for a free one"
            ) from error
        bound = self._server.server_address
        self.url = f"http://{_in_url(str(bound[0]))}:{bound[1]}/?token={token}"
        start(threading.Thread(target=self._server.serve_forever, name="dashboard", daemon=True))
        self._say(self.url)

    @override
    def on_end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


def address_of(text: str) -> tuple[str, int]:
    """Return host and port of PORT or HOST:PORT.

    Raises:
        ConfigError: it is neither.

    >>> address_of("8080"), address_of("0.0.0.0:8080")
    (('127.0.0.1', 8080), ('0.0.0.0', 8080))
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--dashboard takes PORT or HOST:PORT, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, place: tuple[str, int], directory: Path, token: str) -> None:
        if ":" in place[0]:
            import socket

            self.address_family = socket.AF_INET6
        self.directory = directory
        self.token = token
        self._lock = threading.Lock()
        self._data: dict[str, Any] = {}
        self._next = -math.inf
        super().__init__(place, _Handler)

    def data(self) -> dict[str, Any]:
        """Return the run, as it was read some seconds ago, and when to ask again."""
        with self._lock:
            began = time.monotonic()
            if began >= self._next:
                runs = [read_run(self.directory, verify=False)]
                now = time.monotonic()
                every_s = max(_EVERY_S, _SHARE * (now - began))
                self._data, self._next = {"runs": runs, "every_s": every_s}, now + every_s / 2
            return self._data


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        given = parse_qs(asked.query).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._answer(403, "text/plain", "the token is missing, or wrong\n")
            return
        try:
            if asked.path == "/":
                data_url = f"data.json?token={self.server.token}"
                self._answer(200, "text/html", page(self.server.data()["runs"], data_url=data_url))
            elif asked.path == "/data.json":
                body = json.dumps(self.server.data(), allow_nan=False, default=str)
                self._answer(200, "application/json", body)
            else:
                self._answer(404, "text/plain", "there is nothing here\n")
        except TrainingError as error:
            self._answer(503, "text/plain", f"{error}\n")

    def _answer(self, code: int, kind: str, body: str) -> None:
        raw = body.encode()
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        try:
            self.wfile.write(raw)
        except OSError:  # whoever asked has gone
            self.close_connection = True

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: it would hold the token."""
