"""What a host and a cable can do, as `doctor --measure` finds it: the numbers that a plan needs.

They are kept in a JSON file; without one, a plan uses `TYPICAL`, and says so.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distnadam.errors import ConfigError
from distnadam.plain_data import NOT_PARSED


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What one host can do, and the cable between two.

    Attributes:
        cores: that the processes of one host have.
        copy_bytes_per_s: of memory that one core reads and writes, together.
        step_bytes_per_s: of memory that one core's Nadam step reads and writes.
        socket_bytes_per_s: that one core sends, or receives, by TCP.
        turn_s: seconds of a round of a few parameters, one worker and one shard on each host.
        link_bytes_per_s: of a cable, in each direction.
    """

    cores: float
    copy_bytes_per_s: float
    step_bytes_per_s: float
    socket_bytes_per_s: float
    turn_s: float
    link_bytes_per_s: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name}: expected a number above 0, got {value!r}")

    @classmethod
    def load(cls, path: str) -> "Constants":
        """Read a file that `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or lacks a number.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, *NOT_PARSED) as error:
            raise ConfigError(f"{path}: cannot be read as constants: {error}") from error
        return cls.of(found, path)

    @classmethod
    def of(cls, found: Any, where: str) -> "Constants":
        """Return the constants of plain data.

        Raises:
            ConfigError: there is another set of names, or a number that cannot be.
        """
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(found, Mapping) or found.keys() != names:
            got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
            raise ConfigError(f"{where}: expected the names {sorted(names)}, got {got}")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def save(self, path: str) -> None:
        """Write a file that `load` reads.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error}") from error


TYPICAL = Constants(
    cores=8,
    copy_bytes_per_s=10e9,
    step_bytes_per_s=12e9,
    socket_bytes_per_s=2e9,
    turn_s=1e-3,
    link_bytes_per_s=1.25e9,
)
"""A host of some years ago with a cable of 10 Gbit/s."""
