"""Turns what a user writes, a path or a URL, into the directory that it names.

The one place that chooses between local and remote storage; fsspec is imported for URLs alone.
"""

import os
from pathlib import Path
from typing import Any

from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.places import place

DirectoryLike = str | os.PathLike[str] | Directory
"""What names a directory: a path, an fsspec URL, or the directory itself."""


def open_directory(path: DirectoryLike | Any, what: str = "path") -> Directory:
    """Return the directory of a path or URL; nothing is created or read.

    Args:
        path: what a user wrote, or the directory itself.
        what: the argument's name, which begins the message of a ConfigError.

    Raises:
        ConfigError: it is no place, see `places.place`.
        CheckpointError: no filesystem for the URL's protocol is installed, or it refuses the URL.
    """
    if isinstance(path, Directory):
        return path
    found = place(path, what)
    if "://" not in found:
        return LocalDirectory(Path(found))
    from distnadam.checkpoint.storage.remote import open_remote

    return open_remote(found)
