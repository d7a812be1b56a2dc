"""A cloud's notice, as a metadata service may give it, well or badly."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from distnadam.backends import notices
from distnadam.backends.notices import CLOUDS, await_notice, of_aws, of_gcp
from tests.hosts.metadata import Metadata


@contextmanager
def service(*answers: tuple[int, bytes]) -> Iterator[str]:
    """Answer every PUT with a token, and each GET with the next answer, the last one for ever."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer(200, b"token")

        def do_GET(self) -> None:
            self._answer(*(left.pop(0) if len(left) > 1 else left[0]))

        def _answer(self, status: int, body: bytes) -> None:
            if status == 0:  # it speaks no HTTP
                self.wfile.write(body)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def action(at: str) -> bytes:
    return json.dumps({"action": "terminate", "time": at}).encode()


def in_s(seconds: float, form: str) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime(form)


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S"])
def test_a_time_with_and_without_its_zone_is_utc(form: str) -> None:
    with service((200, action(in_s(120, form)))) as url:
        notice = of_aws(url)
    assert notice is not None and 100 < notice.left_s <= 120


def test_a_time_that_is_over_leaves_time_to_move() -> None:
    """At the deadline Ray ends the node, and a host's clock may be fast."""
    with service((200, action(in_s(-3600, "%Y-%m-%dT%H:%M:%SZ")))) as url:
        notice = of_aws(url)
    assert notice is not None and notice.left_s >= 10


def test_nothing_is_announced() -> None:
    with service((404, b"")) as url:
        assert of_aws(url) is None
        assert of_gcp(url) is None
    with service((200, b"FALSE")) as url:
        assert of_gcp(url) is None


def test_an_action_without_a_time_is_a_notice_all_the_same() -> None:
    """One that is hibernated is so at once."""
    for said in (b'{"action": "hibernate"}', b'{"action": "stop", "time": "soon"}'):
        with service((200, said)) as url:
            notice = of_aws(url)
        assert notice is not None and notice.left_s == notices._LEAST_S
        assert notice.why.startswith("AWS: ")


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        ("NONE", False),
        ("MIGRATE_ON_HOST_MAINTENANCE", False),
        ("TERMINATE_ON_HOST_MAINTENANCE", True),
    ],
)
def test_maintenance_that_ends_a_gcp_machine_is_a_notice(event: str, ends: bool) -> None:
    with service((200, b"FALSE"), (200, event.encode())) as url:
        notice = of_gcp(url)
    assert (notice is not None) == ends
    assert notice is None or (notice.why, notice.left_s) == (f"GCP: {event}", 60.0)


@pytest.mark.parametrize("cloud", sorted(CLOUDS))
def test_a_cloud_that_asks_for_what_its_documents_say_gives_its_notice(
    cloud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that end, and headers; no proxy is asked, whatever the environment says."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(notices, "_TOKEN_S", 1)
    monkeypatch.setattr(Metadata, "announced", threading.Event())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    _, ask = CLOUDS[cloud]
    assert ask(url) is None
    Metadata.announced.set()
    if cloud == "aws":
        time.sleep(1.1)  # the token that was had before ends
    notice = ask(url)
    server.shutdown()
    server.server_close()
    assert notice is not None and 25 <= notice.left_s <= 120
    assert cloud in notice.why.lower()


BAD = [
    (500, b"later"),
    (401, b""),
    (200, b"<html>"),
    (200, b"[1]"),
    (200, b"7"),
    (200, b"{}"),
    (200, b"\xff\xfe"),
    (200, b'"stop"'),
    (0, b"no HTTP\r\n\r\n"),
]


def test_a_service_that_answers_badly_is_asked_again() -> None:
    good = (200, action(in_s(60, "%Y-%m-%dT%H:%M:%SZ")))
    with service(*BAD, good) as url:
        assert await_notice("aws", url, 0.01).why.startswith("AWS: terminate at ")


def test_a_service_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_TIMEOUT_S", 0.1)
    asked: list[str] = []

    def ask(base: str) -> Any:
        asked.append(base)
        return of_gcp(good if len(asked) == 3 else base)

    monkeypatch.setitem(notices.CLOUDS, "gcp", ("", ask))
    hanging = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # accepts no one
    url = f"http://127.0.0.1:{hanging.server_port}"
    with service((200, b"TRUE")) as good:
        assert await_notice("gcp", url, 0.01).why == "GCP: preempted"
    hanging.server_close()
    assert asked == [url] * 3
