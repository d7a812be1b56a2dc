"""The source of a task's module, and of what it imports beside it, which goes to the workers.

So a worker on any host runs what the caller runs, whatever the directory, and a worker that is
started again runs it too, though a file may have been edited since. What is installed does not
travel, nor do data files.
"""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import override

_INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Directories whose modules every host has, or must get by installing them."""
_OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """The source of one module, and the path that tracebacks show."""

    path: str
    code: bytes
    is_package: bool


class TaskCode:
    """The sources behind a task; a process that unpickles them imports these modules from them.

    They are the module of the task's class and what that imports from its own directory, directly
    or not, in functions too, and what else this process has loaded from there. They are read once,
    at the first use. Pickle this before the task, so that the modules are there when it is
    unpickled; it becomes None.

    Args:
        task: any object.
    """

    def __init__(self, task: Any) -> None:
        self._module = sys.modules.get(type(task).__module__)

    @cached_property
    def root(self) -> Path | None:
        """The directory that the task's module is imported from; None if it is installed."""
        return None if self._module is None else _root_of(self._module)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The sources by module name."""
        if self._module is None or self.root is None:
            return {}
        return _sources(self.root, self._module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _install, (str(self.root or ""), self.sources)


def _install(root: str, sources: Mapping[str, Source]) -> None:
    """Have this process import the modules from their sources."""
    if sources:
        sys.meta_path.insert(0, _Finder(sources))
    if root and root not in sys.path:
        sys.path.append(root)  # for what has no source, such as extension modules, where it exists


class _Finder(MetaPathFinder):
    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self._sources.get(fullname)
        if source is None:
            return None
        where = [str(Path(source.path).parent)] if source.is_package else None
        return importlib.util.spec_from_file_location(
            fullname, source.path, loader=_Loader(source), submodule_search_locations=where
        )


class _Loader(ExecutionLoader):
    def __init__(self, source: Source) -> None:
        self._source = source

    @override
    def get_filename(self, fullname: str) -> str:
        return self._source.path

    @override
    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source.code)

    @override
    def is_package(self, fullname: str) -> bool:
        return self._source.is_package


def _root_of(module: ModuleType) -> Path | None:
    name = module.__name__ if module.__spec__ is None else module.__spec__.name
    if name.partition(".")[0] == _OURS:
        return None
    if module.__name__ == "__main__" and module.__spec__ is None:  # a script, or a notebook
        file = getattr(module, "__file__", None)
        return Path.cwd() if file is None else Path(file).absolute().parent
    path = _path_of(module)
    if path is None or _is_installed(path):
        return None
    return path.parents[name.count(".") + (path.stem == "__init__")]


def _path_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).absolute()


def _is_installed(path: Path) -> bool:
    standard = Path(sysconfig.get_path("stdlib"))
    return not _INSTALLED.isdisjoint(path.parts) or path.is_relative_to(standard)


def _sources(root: Path, module: ModuleType) -> dict[str, Source]:
    """Return what lies under `root` of a module, all that it imports, and all that is loaded."""
    found: dict[str, Source] = {}
    wanted = list(sys.modules)
    path = _path_of(module)
    if module.__name__ == "__main__" and path is not None:  # pickled by value, but not its imports
        with suppress(OSError):
            wanted += _imported(path.read_bytes(), module.__package__ or "")
    while wanted:
        name = wanted.pop()
        if name in found or (source := _source(root, name)) is None:
            continue
        found[name] = source
        package = name if source.is_package else name.rpartition(".")[0]
        wanted += [package, *_imported(source.code, package)]
    for name in list(found):  # directories without an __init__.py
        while name := name.rpartition(".")[0]:
            path = root.joinpath(*name.split("."), "__init__.py")
            found.setdefault(name, Source(str(path), b"", is_package=True))
    return found


def _source(root: Path, name: str) -> Source | None:
    """Return the source of a module that is, or would be, imported from `root`."""
    top = name.partition(".")[0]
    loaded = sys.modules.get(name)
    if top in ("", "__main__", _OURS) or (loaded is None and top in sys.stdlib_module_names):
        return None
    within = root.joinpath(*name.split("."))
    for path in (within / "__init__.py", within.with_name(f"{within.name}.py")):
        with suppress(OSError, ValueError):  # it is no file's name, or there is none
            code = path.read_bytes()
            ours = loaded is None or ((file := _path_of(loaded)) and file.samefile(path))
            return Source(str(path), code, path.stem == "__init__") if ours else None
    return None


def _imported(code: bytes, package: str) -> Iterator[str]:
    """Yield the names of modules that a source may import, in functions too."""
    nodes: list[ast.AST] = []
    with suppress(SyntaxError, ValueError):  # then nobody has imported it
        nodes.extend(ast.walk(ast.parse(code)))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # beyond the top
                base = importlib.util.resolve_name(
                    "." * node.level + (node.module or ""), package or None
                )
                yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
