"""The shell text of each kind of deploy file, with default values for its variables."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

from tests.deploy import units
from tests.deploy.tree import Tree, walk


def lines(tree: Tree, path: str) -> Iterator[str]:
    """Return the shell text of one deploy file."""
    for begin, end, reader in READERS:
        if path.startswith(begin) and path.endswith(end):
            yield from reader(tree, path)
            return


def whole(text: str) -> str:
    """Join lines that end in a backslash with the next."""
    return re.sub(r"\\\n\s*", " ", text)


def _unit(tree: Tree, path: str) -> Iterator[str]:
    unit = units.Unit.parse(tree.texts[path])
    files = {
        f"/etc/distnadam/{name}.env": tree.texts[f"deploy/hosts/{name}.env"]
        for name in ("ray", "train")
    }
    yield shlex.join(unit.command(unit.environment(files)))


def _dockerfile(tree: Tree, path: str) -> Iterator[str]:
    for line in whole(tree.texts[path]).splitlines():
        word, _, rest = line.partition(" ")
        if word in ("CMD", "ENTRYPOINT"):
            yield " ".join(json.loads(rest))
        elif word == "RUN":
            yield rest


def _compose(tree: Tree, path: str) -> Iterator[str]:
    for service in tree.compose["services"].values():
        yield str(service.get("command", ""))
        yield " ".join(service.get("healthcheck", {}).get("test", ["CMD"])[1:])


def _launcher(tree: Tree, path: str) -> Iterator[str]:
    yield from (
        line
        for key, found in tree.documents(path)[0].items()
        if key.endswith("_commands")
        for line in found
    )


def _manifest(tree: Tree, path: str) -> Iterator[str]:
    for document in tree.documents(path):
        for at, value in walk(document):
            yield from _of_kuberay(at, value)


def _of_kuberay(at: str, value: Any) -> Iterator[str]:
    """Return a manifest's commands: `ray start`, entrypoints, patches' too, and containers'."""
    if at.endswith("/rayStartParams"):
        yield " ".join(["ray start", *(f"--{key}={one}" for key, one in value.items())])
    elif at.endswith("/entrypoint"):
        yield value
    elif isinstance(value, dict) and value.get("path") == "/spec/entrypoint":
        yield value["value"]
    elif at.endswith(("/command", "/args")) and isinstance(value, list):
        yield " ".join(map(str, value))


def _script(tree: Tree, path: str) -> Iterator[str]:
    yield from whole(tree.texts[path]).splitlines()


def _prose(tree: Tree, path: str) -> Iterator[str]:
    yield from (
        line[4:] for line in whole(tree.texts[path]).splitlines() if line.startswith("    ")
    )


READERS = [
    ("deploy/hosts/", ".service", _unit),
    ("deploy/docker/", "Dockerfile", _dockerfile),
    ("deploy/docker/", "compose.yaml", _compose),
    ("deploy/launcher/", ".yaml", _launcher),
    ("deploy/kubernetes/", ".yaml", _manifest),
    ("deploy/", ".sh", _script),
    ("deploy/", ".md", _prose),
]
