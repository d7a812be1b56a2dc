"""The page in a real browser: no error in its console, curves, runs to hide, narrow and dark."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam
from distnadam.report.data import read_run
from tests.training.test_fit import Quadratic, train

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class FailsOnce(Quadratic):
    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if step == 30 and rank == 1 and not hasattr(self, "failed"):
            self.failed = True
            raise ZeroDivisionError("</script> the <b>batch</b> is bad")
        return super().batch(step, rank, world_size)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly", reason="plotly is not installed")
    from distnadam.report.page import page

    root = tmp_path_factory.mktemp("runs")
    train(root / "plain", 60, save_every=20, evaluate_every=20)
    optimizer = DistNadam(lr=0.01)
    train(root / "failing", 60, FailsOnce(), optimizer=optimizer, evaluate_every=20)
    path = root / "report.html"
    path.write_text(page([read_run(root / "plain"), read_run(root / "failing")]), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_reads_well_at_this_width_in_this_scheme(
    width: int, scheme: Any, browser: Any, page_path: Path
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    tab, said = context.new_page(), list[str]()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda sent: said.append(sent.url) if "http" in sent.url[:5] else None)
    tab.goto(page_path.as_uri())
    tab.wait_for_selector("#loss .main-svg")

    def curves(plot: str = "#loss") -> int:
        return int(tab.locator(f"{plot} .scatterlayer .trace").count())

    def contrast() -> float:
        """Of the text's colour with the card's, as WCAG defines it."""
        return float(
            tab.evaluate("""() => {
            const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
                .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            const weights = [0.2126, 0.7152, 0.0722];
            const light = (text) => rgb(text).reduce((sum, c, i) => sum + c * weights[i], 0);
            const style = getComputedStyle(document.querySelector("main section:nth-of-type(2)"));
            const both = [style.color, style.backgroundColor].map(light).sort((a, b) => b - a);
            return (both[0] + 0.05) / (both[1] + 0.05);
        }""")
        )

    def labels(axis: str) -> list[dict[str, float]]:
        """Where the labels of the loss's axis lie."""
        found = tab.evaluate(
            "(axis) => [...document.querySelectorAll(`#loss .${axis}tick text`)]"
            ".map((each) => each.getBoundingClientRect().toJSON())",
            axis,
        )
        return list(found)

    def overlapping(axis: str, side: str, end: str) -> bool:
        places = sorted((each[side], each[end]) for each in labels(axis))
        assert len(places) >= 3
        return any(a[1] > b[0] for a, b in pairwise(places))

    assert curves() == 5, "two runs, each raw and smoothed, and a recovery"
    assert not overlapping("y", "top", "bottom")
    tab.locator("#loss .nsewdrag").first.hover()
    tab.locator("#loss .hoverlayer", has_text="plain").wait_for()
    assert tab.locator("#throughput .scatterlayer .trace").count() == 2
    tab.locator("#log-x").check()
    assert not overlapping("x", "left", "right")
    tab.locator("#log-x").uncheck()
    assert tab.inner_text("body").count("failing") == 1, "a name is said once, then its mark"
    assert tab.evaluate("document.documentElement.scrollHeight") < 4500
    tab.locator("#over-time summary").click()
    tab.wait_for_selector("#phases-1 .main-svg")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert contrast() > 7
    assert "ZeroDivisionError: </script> the <b>batch</b> is bad" in tab.inner_text("#recoveries")
    assert "verified" in tab.inner_text("#checkpoints")
    assert "0-1" in tab.inner_text("#hosts")
    differing = tab.inner_text("#configuration")
    assert "lr" in differing
    assert "beta_1" not in differing
    tab.locator("#differs").uncheck()
    assert "beta_1" in tab.inner_text("#configuration")
    tab.locator("#runs input").nth(1).uncheck()
    assert curves() == 2, "one run"
    assert "beta_1" in tab.inner_text("#configuration"), "all of it, in columns"
    assert "ZeroDivisionError" not in tab.inner_text("#recoveries")
    assert tab.locator("#overview .card").count() == 1
    tab.locator("#raw").uncheck()
    assert curves() == 1
    tab.locator("#log-y").uncheck()
    assert tab.evaluate("document.getElementById('loss').layout.yaxis.type") == "linear"
    assert said == []
    context.close()


def test_the_dashboard_draws_a_run_while_it_goes_on(browser: Any, tmp_path: Path) -> None:
    from distnadam.report.dashboard import Dashboard

    class Looking(Quadratic):
        """Opens the dashboard at the first evaluation, and looks again at the last."""

        tab: Any = None
        said: list[str] = []  # noqa: RUF012
        reached: list[str] = []  # noqa: RUF012

        def evaluate(self, params: Any) -> dict[str, float]:
            if Looking.tab is None:
                Looking.tab = browser.new_page()
                Looking.tab.on("console", lambda message: self.said.append(message.text))
                Looking.tab.on("pageerror", lambda error: self.said.append(str(error)))
                Looking.tab.goto(dashboard.url)
                Looking.tab.wait_for_selector("#loss .main-svg")
            else:
                Looking.tab.locator("#overview .card", has_text="40 of 40").wait_for()
            self.reached.append(Looking.tab.inner_text("#overview .card"))
            return super().evaluate(params)

    dashboard = Dashboard()
    train(tmp_path / "run", 40, Looking(), evaluate_every=20, callbacks=[dashboard])
    assert "20 of 40" in Looking.reached[0]
    assert Looking.said == []
    Looking.tab.locator("#summary", has_text="The run has ended").wait_for()
    Looking.tab.close()
