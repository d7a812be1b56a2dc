"""How to install what an optional part of the package needs, for every error that says so.

No index has this package, so its extras can be named only where its source lies; what they need
can be installed anywhere.
"""

import importlib.metadata
import re
import shlex
from collections.abc import Iterator

_OURS = "distnadam"


def how_to_install(name: str) -> str:
    """Return the command that installs what an extra of this package needs, or one requirement.

    Args:
        name: of the extra, or of a package that this one, or an extra, requires.

    >>> how_to_install("torch")
    "pip install 'torch>=2.4'"
    """
    try:
        rows = list(_requirements())
    except importlib.metadata.PackageNotFoundError:  # it runs from its source
        return f"pip install '.[{name}]', where distnadam's pyproject.toml is"
    found = [requirement for requirement, extra in rows if extra == name]
    found = found or [each for each, _ in rows if _package(each) == name][:1]
    return f"pip install {shlex.join(found or [name])}"


def _requirements() -> Iterator[tuple[str, str | None]]:
    """Yield what is required, each with the extra that requires it."""
    for line in importlib.metadata.requires(_OURS) or []:
        requirement, _, condition = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", condition)
        yield requirement.replace(" ", ""), extra[1] if extra else None


def _package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
