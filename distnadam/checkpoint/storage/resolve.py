"""From what a user writes, a path or a URL, to the directory it names."""

import os
from pathlib import Path

from distnadam.checkpoint.storage.base import Folder
from distnadam.checkpoint.storage.local import LocalFolder


def place(where: "str | os.PathLike[str] | Folder") -> Folder:
    """Return the folder of a path or URL; raise CheckpointError where no filesystem of that protocol is installed."""
    if isinstance(where, Folder):
        return where
    text = os.fspath(where)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalFolder(Path(text))
    if protocol in ("file", "local"):
        return LocalFolder(Path(rest))
    from distnadam.checkpoint.storage.remote import remote_folder

    return remote_folder(text)
