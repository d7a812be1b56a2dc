"""Rules on names in deploy files: one Ray version, pinned images, real commands and metrics."""

import json
import re
from collections.abc import Iterator

from distnadam.metrics.table import METRICS
from tests.deploy import promql, shell
from tests.deploy.commands import commands, refused
from tests.deploy.tree import Tree

DOCKERFILE = "deploy/docker/Dockerfile"
BOARD, ALERTS = (
    "deploy/monitoring/grafana/dashboards/distnadam.json",
    "deploy/monitoring/alerts.yml",
)
RAY_SAYS = re.compile(
    r"(?:rayVersion: |\bray(?:\[[\w,]+\])?==|rayproject/ray:|\bRay )\"?v?(\d+\.\d+\.\d+)"
)
IMAGE = re.compile(
    r"^(?P<name>[\w./-]+(?::\d+/[\w./-]+)?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?$"
)
OWN_LABELS = {"le", "job", "instance", "cluster", "pod"}


def one_ray_version(tree: Tree) -> Iterator[str]:
    """Every file that names a Ray version names the one that is tested."""
    said = [
        (path, version)
        for path in tree.under("deploy/")
        for version in RAY_SAYS.findall(tree.texts[path])
    ]
    if not said:
        yield "no deploy file says which Ray it is for"
    for path, version in said:
        if version != tree.ray_version:
            yield f"{path}: Ray {version}, but {tree.ray_version} is tested"


def images(tree: Tree) -> Iterator[tuple[str, str]]:
    """Yield every image that a deploy file names, with its path."""
    for path, at, value in tree.values("deploy/"):
        if at.endswith("/image") and isinstance(value, str):
            yield path, value
        elif isinstance(value, dict) and "newName" in value:
            yield path, f"{value['newName']}:{value.get('newTag', '')}"
    yield from (
        (DOCKERFILE, name) for name in re.findall(r"^FROM (\S+)", tree.texts[DOCKERFILE], re.M)
    )


def pinned_images(tree: Tree) -> Iterator[str]:
    """Every image has a version, and ours the package's."""
    for path, image in images(tree):
        match = IMAGE.match(image)
        tag = match["tag"] if match is not None else None
        if match is None or (
            match["digest"] is None and (tag is None or not re.search(r"\d", tag))
        ):
            yield f"{path}: image {image} is not pinned to a version"
        elif match["name"].rpartition("/")[2] == "distnadam" and tag != tree.package_version:
            yield f"{path}: image {image} is not of the package's version, {tree.package_version}"


def commands_that_exist(tree: Tree) -> Iterator[str]:
    """Every command of ray and distnadam is accepted by the installed command line."""
    for path in tree.under("deploy/"):
        for line in shell.lines(tree, path):
            for command in commands(line):
                if (why := refused(command)) is not None:
                    yield f"{path}: {' '.join(command)[:80]}: {why}"


def expressions(tree: Tree) -> Iterator[tuple[str, str]]:
    """Yield every PromQL expression of dashboard and alerts, with its path."""
    for panel in json.loads(tree.texts[BOARD])["panels"]:
        yield from ((f"{BOARD}: {panel['title']}", target["expr"]) for target in panel["targets"])
    for rule in tree.documents(ALERTS)[0]["groups"][0]["rules"]:
        yield f"{ALERTS}: {rule['alert']}", rule["expr"]


def exported() -> dict[str, str]:
    """Return our metrics by the names under which Ray exports them."""
    names = {}
    for name, metric in METRICS.items():
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {f"ray_{name}{end}": name for end in ends}
    return names


def metrics_that_exist(tree: Tree) -> Iterator[str]:
    """Dashboard and alerts name only metrics that are exported, or Prometheus's `up`."""
    for where, expression in expressions(tree):
        for name in promql.metrics(expression):
            if name not in exported() and name != "up":
                yield f"{where}: nothing exports {name}"


def tags_that_exist(tree: Tree) -> Iterator[str]:
    """Dashboard and alerts group and match only by tags of their metrics."""
    for where, expression in expressions(tree):
        ours = [exported()[name] for name in promql.metrics(expression) if name in exported()]
        tags = OWN_LABELS.union(*(METRICS[name].tag_keys for name in ours))
        if foreign := promql.labels(expression) - tags:
            yield f"{where}: no metric there has the tags {sorted(foreign)}"


def metrics_on_the_board(tree: Tree) -> Iterator[str]:
    """Every exported metric is on the dashboard."""
    shown = {
        name
        for where, text in expressions(tree)
        if where.startswith(BOARD)
        for name in promql.metrics(text)
    }
    if hidden := METRICS.keys() - {exported().get(name) for name in shown}:
        yield f"{BOARD}: does not show {sorted(hidden)}"
