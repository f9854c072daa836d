"""The registry of methods and of objects in users' files and installed packages."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError, nearest, unknown

if TYPE_CHECKING:
    from polopt.method import Method

_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry under its name and return it."""
    _METHODS[method.name] = method
    return method


@functools.cache
def load_everything() -> None:
    """Import all parts and methods, those of installed packages (entry points polopt.parts, polopt.methods) included."""
    for package in ("polopt.parts", "polopt.methods"):
        root = importlib.import_module(package)
        for info in pkgutil.walk_packages(root.__path__, package + "."):
            importlib.import_module(info.name)
    for group in ("polopt.parts", "polopt.methods"):
        for point in entry_points(group=group):
            point.load()


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def get_method(name: str) -> Method:
    """The method called `name` (case, dashes and dots do not matter), or `path/to/file.py:NAME` of the user's own."""
    from polopt.method import Method

    load_everything()
    if ".py:" in name:
        found = load_object(name)
        if not isinstance(found, Method):
            raise CallError(f"{name} is {type(found).__name__}, expected a Method (made with .but(...))")
        return found
    table = {_plain(k): v for k, v in _METHODS.items()}
    if _plain(name) in table:
        return table[_plain(name)]
    raise unknown("method", name, _METHODS)


def all_methods() -> dict[str, Method]:
    """Every registered method by name, parents before children."""
    load_everything()

    def depth(m: Method) -> int:
        return 0 if m.parent is None else 1 + depth(m.parent)

    return {m.name: m for m in sorted(_METHODS.values(), key=lambda m: (depth(m), m.name))}


def load_object(spec: str) -> Any:
    """The object `NAME` of `path/to/file.py:NAME`; errors name the file, and the nearest name in it."""
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise CallError(f"'{spec}': there is no file {path}")
    module_name = f"_polopt_user_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if module_name in sys.modules:
        module = sys.modules[module_name]
    else:
        found = importlib.util.spec_from_file_location(module_name, path)
        if found is None or found.loader is None:
            raise CallError(f"'{spec}': {path} is not a Python file")
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module
        try:
            found.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise CallError(f"'{spec}': importing {path} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        public = [k for k in vars(module) if not k.startswith("_")]
        raise CallError(f"'{spec}': {path} has no '{name}'{nearest(name, public)}")
    return getattr(module, name)
