"""The deploy files as texts by path, so that a broken copy is an edit of one text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
TEXTS = {".yaml", ".yml", ".json", ".service", ".env", ".sh", ".md", ".py", ""}
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Tree:
    """Texts by path from the repository's root."""

    texts: dict[str, str]

    @classmethod
    def read(cls) -> "Tree":
        """Read the deploy files, and the repository's that they must agree with.

        Files that .gitignore names are left out.
        """
        ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()}
        found = [
            path
            for path in sorted((ROOT / "deploy").rglob("*"))
            if path.is_file() and path.suffix in TEXTS
        ]
        names = [str(path.relative_to(ROOT)) for path in found] + [
            "constraints.txt",
            "pyproject.toml",
        ]
        return cls(
            {
                name: (ROOT / name).read_text()
                for name in names
                if not any(name.startswith(each) for each in ignored)
            }
        )

    def edited(self, path: str, old: str, new: str) -> "Tree":
        """Return a copy in which one file has `new` in place of each `old`, which must occur."""
        assert old in self.texts[path], (
            f"{path} does not say {old!r}, so this copy would not be broken"
        )
        return Tree(self.texts | {path: self.texts[path].replace(old, new)})

    def documents(self, path: str) -> list[Any]:
        """Return all YAML documents of one file."""
        return [
            document for document in yaml.load_all(self.texts[path], Loader) if document is not None
        ]

    def values(self, folder: str) -> Iterator[tuple[str, str, Any]]:
        """Yield every value in a directory's YAML files, with its file and its path of keys."""
        for path in self.under(folder, ".yaml", ".yml"):
            yield from (
                (path, at, value)
                for document in self.documents(path)
                for at, value in walk(document)
            )

    def settings(self, path: str) -> list[str]:
        """Return the lines of an environment file, without comments."""
        return [line for line in self.texts[path].splitlines() if line and not line.startswith("#")]

    @cached_property
    def compose(self) -> dict[str, Any]:
        """Return the compose file, with a value for each secret."""
        text = re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", r"\1", self.texts["deploy/docker/compose.yaml"])
        whole: dict[str, Any] = yaml.load(text, Loader)
        return whole

    def under(self, folder: str, *suffixes: str) -> list[str]:
        """Return the paths of a directory's files."""
        return [
            path
            for path in self.texts
            if path.startswith(folder) and path.endswith(suffixes or ("",))
        ]

    @cached_property
    def ray_version(self) -> str:
        """Return the Ray version that is tested."""
        return self.pinned("ray")

    @cached_property
    def package_version(self) -> str:
        """Return the package's own version."""
        return next(
            line.split('"')[1]
            for line in self.texts["pyproject.toml"].splitlines()
            if line.startswith("version =")
        )

    def pinned(self, package: str) -> str:
        """Return the version of a package in constraints.txt."""
        lines = self.texts["constraints.txt"].splitlines()
        return next(
            version
            for name, _, version in (line.partition("==") for line in lines)
            if name.lower() == package
        )


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value inside plain data, with its path of keys."""
    yield path, value
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from walk(child, f"{path}/{key}")
