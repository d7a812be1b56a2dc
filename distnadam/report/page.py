"""Puts a page together: the template, its style and script, plotly.js, and the runs' data."""

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from distnadam.errors import TrainingError
from distnadam.extras import how_to_install
from distnadam.report.data import Run

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def page(runs: Sequence[Run], *, data_url: str | None = None) -> str:
    """Return the HTML page on some runs, which needs no other file.

    Args:
        runs: at least one.
        data_url: where a page that is served asks for newer data; None for a file.

    Raises:
        TrainingError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise TrainingError(f"a report needs plotly: {how_to_install('report')}") from error
    parts = {
        "title": html.escape(", ".join(run["name"] for run in runs)),
        "style": _part("page.css"),
        "script": _part("page.js"),
        "plotly": str(get_plotlyjs()),
        "data": as_script({"runs": runs, "data_url": data_url}),
    }
    return _PLACE.sub(lambda place: parts[place[1]], _part("page.html"))


def as_script(data: Any) -> str:
    """Return data as JSON that no text in it can end a script element with."""
    return json.dumps(data, allow_nan=False, default=str).replace("<", "\\u003c")


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
