"""polopt: policy optimization as small parts that combine, for control, language and beyond.

    import polopt
    run = polopt.train("ppo", "gym:CartPole-v1", budget="100k-decisions", out="runs/first")
    print(polopt.explain("ppo"), run.summary["eval_score"])

Names are loaded when they are first used, so that `import polopt` itself is quick.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polopt.api import (
        certify,
        check_evidence,
        compare,
        diff,
        evaluate,
        explain,
        export,
        film,
        from_pretrained,
        gather_evidence,
        load,
        method,
        methods,
        resume,
        train,
        transitions,
    )
    from polopt.batch import Batch
    from polopt.errors import CallError, PoloptError
    from polopt.method import Method
    from polopt.part import Part, Range, register_part
    from polopt.recipe import Recipe, Stage
    from polopt.registry import register
    from polopt.update import Update

    __version__: str

#: public name -> module that defines it
_HOME = {
    **dict.fromkeys(
        ("compare", "diff", "evaluate", "explain", "export", "film", "load", "method", "methods", "resume", "train"), "polopt.api"
    ),
    **dict.fromkeys(("certify", "check_evidence", "from_pretrained", "gather_evidence", "transitions"), "polopt.api"),
    "Batch": "polopt.batch",
    **dict.fromkeys(("CallError", "PoloptError"), "polopt.errors"),
    **dict.fromkeys(("Method", "Update"), "polopt.method"),
    **dict.fromkeys(("Part", "Range", "register_part"), "polopt.part"),
    **dict.fromkeys(("Recipe", "Stage"), "polopt.recipe"),
    "register": "polopt.registry",
}

__all__ = [
    "Batch", "CallError", "Method", "Part", "PoloptError", "Range", "Recipe", "Stage", "Update", "__version__", "certify",
    "check_evidence", "compare", "diff", "evaluate", "explain", "export", "film", "from_pretrained", "gather_evidence", "load",
    "method", "methods", "register", "register_part", "resume", "train", "transitions",
]  # fmt: skip


def _load(name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("polopt")
    if name in _HOME:
        return _load(name)
    raise AttributeError(f"module 'polopt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `polopt.method(...)` and `polopt.methods()` functions although submodules have these names."""

    @property
    def method(self) -> Any:
        """The function `polopt.api.method`."""
        return _load("method")

    @method.setter
    def method(self, module: ModuleType) -> None:
        """Called by the import system when the submodule was imported; that stays in `sys.modules`."""

    @property
    def methods(self) -> Any:
        """The function `polopt.api.methods`."""
        return _load("methods")

    @methods.setter
    def methods(self, module: ModuleType) -> None:
        """As for `method`."""


sys.modules[__name__].__class__ = _Package
