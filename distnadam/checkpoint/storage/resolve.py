"""From what a user writes, a path or a URL, to the directory it names."""

import os
from pathlib import Path

from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory


def place(where: "str | os.PathLike[str] | Directory") -> Directory:
    """Return the folder of a path or URL; raise CheckpointError where no filesystem of that
    protocol is installed.
    """
    if isinstance(where, Directory):
        return where
    text = os.fspath(where)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalDirectory(Path(text))
    if protocol in ("file", "local"):
        return LocalDirectory(Path(rest))
    from distnadam.checkpoint.storage.remote import remote_folder

    return remote_folder(text)
