"""The deploy files as the rules see them: texts by path, so that a broken copy is the same texts
with one of them edited.
"""

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
        """The files as they are, and those of the repository that they must agree with; what
        .gitignore names is not read.
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
        """A copy in which `old`, which must be there, is `new` everywhere in one file."""
        assert old in self.texts[path], (
            f"{path} does not say {old!r}, so this copy would not be broken"
        )
        return Tree(self.texts | {path: self.texts[path].replace(old, new)})

    def documents(self, path: str) -> list[Any]:
        """All YAML documents of one file."""
        return [
            document for document in yaml.load_all(self.texts[path], Loader) if document is not None
        ]

    def values(self, folder: str) -> Iterator[tuple[str, str, Any]]:
        """Every value in a folder's YAML files, with its file and the way to it."""
        for path in self.under(folder, ".yaml", ".yml"):
            yield from (
                (path, at, value)
                for document in self.documents(path)
                for at, value in walk(document)
            )

    def settings(self, path: str) -> list[str]:
        """The lines of an environment file, without comments."""
        return [line for line in self.texts[path].splitlines() if line and not line.startswith("#")]

    @cached_property
    def compose(self) -> dict[str, Any]:
        """The compose file, with a word for each secret."""
        text = re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", r"\1", self.texts["deploy/docker/compose.yaml"])
        whole: dict[str, Any] = yaml.load(text, Loader)
        return whole

    def under(self, folder: str, *suffixes: str) -> list[str]:
        """The paths of a folder's files."""
        return [
            path
            for path in self.texts
            if path.startswith(folder) and path.endswith(suffixes or ("",))
        ]

    @cached_property
    def ray_version(self) -> str:
        """The Ray that is tested."""
        return self.pinned("ray")

    @cached_property
    def package_version(self) -> str:
        """The package's own version."""
        return next(
            line.split('"')[1]
            for line in self.texts["pyproject.toml"].splitlines()
            if line.startswith("version =")
        )

    def pinned(self, package: str) -> str:
        """The version of a package in constraints.txt."""
        lines = self.texts["constraints.txt"].splitlines()
        return next(
            version
            for name, _, version in (line.partition("==") for line in lines)
            if name.lower() == package
        )


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside plain data, with the way to it."""
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
