"""Reads a systemd unit: its settings, its program's environment, and the words of its command.

The rules are those of systemd.syntax, systemd.service and systemd.exec, as far as our units use
them; a key may be given more than once.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = "/opt/distnadam/venv/bin"
"""Where units have our programs."""


@dataclass(frozen=True)
class Unit:
    """The settings of a unit in the order of its lines, each with its section and key."""

    settings: tuple[tuple[str, str, str], ...]

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Parse a unit's text."""
        found, section = [], ""
        for line in _lines(text):
            if line.startswith("["):
                section = line.strip("[]")
            else:
                key, _, value = line.partition("=")
                found.append((section, key.strip(), value.strip()))
        return cls(tuple(found))

    @classmethod
    def of_hosts(cls, path: Path, programs: Path) -> "Unit":
        """Read a unit of deploy/hosts, with its programs taken from another directory."""
        return cls.parse(path.read_text().replace(PROGRAMS, str(programs)))

    def values(self, section: str, key: str) -> list[str]:
        """Return all values of a key; an empty value removes those before it."""
        values: list[str] = []
        for at, name, value in self.settings:
            if (at, name) == (section, key):
                values = [*values, value] if value else []
        return values

    def environment(self, files: Mapping[str, str]) -> dict[str, str]:
        """Return the program's environment, with environment files given as texts by path.

        A file overrides `Environment=`.
        """
        env = dict(
            word.split("=", 1)
            for value in self.values("Service", "Environment")
            for word in shlex.split(value)
        )
        for path in self.values("Service", "EnvironmentFile"):
            if path.startswith("-") and path[1:] not in files:
                continue
            env |= assignments(files[path.lstrip("-")])
        return env

    def command(self, env: Mapping[str, str]) -> list[str]:
        """Return the words of the one `ExecStart=` in this environment."""
        (line,) = self.values("Service", "ExecStart")
        return words(line, env)


def assignments(text: str) -> dict[str, str]:
    """Return the variables of an environment file; a value may be quoted, and may hold blanks."""
    pairs = (line.split("=", 1) for line in _lines(text))
    return {
        name.strip(): shlex.split(value)[0] if value.startswith(('"', "'")) else value.strip()
        for name, value in pairs
    }


def words(line: str, env: Mapping[str, str]) -> list[str]:
    """Split a command line into words.

    ${NAME} stays within its word, even if empty; a word $NAME is split into its value's words.
    """
    found: list[str] = []
    for word in shlex.split(line):
        if alone := re.fullmatch(r"\$([A-Za-z_]\w*)", word):
            found += shlex.split(env.get(alone[1], ""))
        else:
            found.append(
                re.sub(
                    r"\$\$|\$\{(\w+)\}",
                    lambda match: env.get(match[1], "") if match[1] else "$",
                    word,
                )
            )
    return found


def _lines(text: str) -> list[str]:
    """Yield the lines that are not empty, each joined with its continuation lines."""
    kept = [line for line in text.splitlines() if not line.lstrip().startswith(("#", ";"))]
    whole = re.sub(r"\\\n", " ", "\n".join(kept))
    return [line.strip() for line in whole.splitlines() if line.strip()]
