"""The page that is served while a run goes on: to this host, by a token, until the run ends."""

import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from distnadam.errors import ConfigError, TrainingError
from distnadam.report.dashboard import Dashboard, address_of
from tests.terminal import OnTerminal
from tests.training.test_fit import Quadratic, train

pytest.importorskip("plotly", reason="plotly is not installed")
pytestmark = pytest.mark.slow


def get(url: str) -> tuple[int, str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


class Asking(Quadratic):
    """Asks the dashboard of the run while it is evaluated."""

    def __init__(self, dashboard: Dashboard) -> None:
        super().__init__()
        self.dashboard: Any = dashboard
        self.answers: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "dashboard": None}  # ranks get copies

    def evaluate(self, params: Any) -> dict[str, float]:
        url = self.dashboard.url
        token = url.partition("token=")[2]
        base = url.partition("?")[0]
        for asked in (
            url,
            f"{base}data.json?token={token}",
            base,
            f"{base}?token={token[:-1]}x",
            f"{base}data.json",
            f"{base}../../etc/passwd?token={token}",
        ):
            self.answers.append(get(asked))
        return super().evaluate(params)


def test_a_run_is_served_by_its_token_while_it_goes_on(tmp_path: Path) -> None:
    said = list[str]()
    dashboard = Dashboard(say=said.append)
    task = Asking(dashboard)
    train(tmp_path / "run", 20, task, callbacks=[dashboard])
    assert said == [dashboard.url]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", said[0])
    page, data, *refused, elsewhere = task.answers
    assert page[0] == 200
    assert "Training report" in page[1]
    assert page[2]["Cache-Control"] == "no-store"
    assert "default-src 'none'" in page[2]["Content-Security-Policy"]
    found = json.loads(data[1])
    assert found["runs"][0]["reached"] == 20
    assert found["runs"][0]["outcome"] == "running"
    assert [each[0] for each in refused] == [403, 403, 403]
    assert elsewhere[0] == 404
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(said[0], timeout=5)


def test_a_port_that_is_taken_ends_the_run_by_name(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrainingError, match=rf"cannot listen at 127.0.0.1:{port}: Address"):
            train(tmp_path, 5, callbacks=[Dashboard(port=port)])


@pytest.mark.parametrize("text", ["digits", "host:", "1:2:x", "70000", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="takes PORT or HOST:PORT"):
        address_of(text)


def test_its_url_is_seen_on_a_terminal(tmp_path: Path) -> None:
    args = ["-m", "distnadam", "train", "digits", "--local", "--dashboard", "--steps", "100000"]
    with OnTerminal([*args, "--checkpoint-dir", "run"], tmp_path) as terminal:
        screen = terminal.shows(lambda screen: "compute" in screen)
        url = re.search(r"dashboard: (\S+)", screen)
        assert url is not None, screen
        assert get(url[1])[0] == 200
