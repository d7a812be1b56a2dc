"""Turns what a user writes, a path or a URL, into the directory that it names.

The one place that chooses between local and remote storage; fsspec is imported for URLs alone.
"""

import os
from pathlib import Path

from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory

DirectoryLike = str | os.PathLike[str] | Directory
"""What names a directory: a path, an fsspec URL, or the directory itself."""


def open_directory(path: DirectoryLike) -> Directory:
    """Return the directory of a path or URL; nothing is created or read.

    Raises:
        CheckpointError: no filesystem for the URL's protocol is installed.
    """
    if isinstance(path, Directory):
        return path
    text = os.fspath(path)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalDirectory(Path(text))
    if protocol in ("file", "local"):
        return LocalDirectory(Path(rest))
    from distnadam.checkpoint.storage.remote import open_remote

    return open_remote(text)
