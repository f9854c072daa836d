"""Stored results: where evidence and certificates lie, reading them, and whether they still belong to the present method."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

from polopt.errors import CallError
from polopt.method import Method
from polopt.part import Part
from polopt.paths import Slot, method_leaves
from polopt.registry import all_methods, load_everything

FOLDER = "evidence"
CERTIFICATES, GOLDEN = "certificates", "golden"
#: What the catalogue shows of a stored file.
EVIDENCE_SHOWN = (
    "result", "sentence", "claim", "tested", "baseline", "task", "budget", "metric", "reduce", "expect", "margin", "difference",
    "pairs", "seeds", "date", "commit", "command",
)  # fmt: skip
CERTIFICATE_SHOWN = ("certified", "line", "reasons", "date", "commit", "seconds", "command")
RESULTS = ("shown", "not shown", "undecided")


# -------------------------------------------------------------------- where
def repository() -> Path | None:
    """The repository that this package is run from, if it was installed from one in place."""
    root = Path(__file__).parents[4]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "polopt").is_dir() else None


def folders() -> list[Path]:
    """Where stored results are looked for, in this order: here, in the repository, in the package."""
    root = repository()
    return [Path.cwd() / FOLDER, *([root / FOLDER] if root else []), Path(__file__).parents[2] / "assets" / FOLDER]


def home() -> Path:
    """Where new results go: `evidence` here, or in the repository where it is being worked in."""
    here, root = Path.cwd() / FOLDER, repository()
    inside = root is not None and Path.cwd().resolve().is_relative_to(root.resolve())
    return root / FOLDER if root is not None and inside and not here.is_dir() else here


def find(*parts: str) -> Path | None:
    """The first stored file of this name ("certificates", "ppo.json")."""
    return next((p for f in folders() if (p := f.joinpath(*parts)).is_file()), None)


@functools.cache
def _library() -> frozenset[str]:
    """Names of the methods that are made in this package."""
    load_everything()
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("polopt.methods.")]
    return frozenset(value.name for m in modules for value in vars(m).values() if isinstance(value, Method))


def registered(method: Method) -> bool:
    """Whether a method is one of the library's, unchanged; not one that a file of somebody's own has registered."""
    return method.name in _library() and all_methods().get(method.name) == method


# -------------------------------------------------------------------- what
def read(path: Path) -> dict[str, Any]:
    """A stored JSON file. Raises `CallError` naming one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CallError(f"{path} is damaged: {error}; remove it or make it again") from error
    if not isinstance(found, dict):
        raise CallError(f"{path} is damaged: it holds {type(found).__name__}, expected an object; remove it or make it again")
    return found


def evidence(name: str) -> dict[str, Any] | None:
    """The stored result of a method's miniature experiment."""
    path = find(f"{name}.json")
    found = read(path) if path else None
    if found is not None and found.get("result") not in RESULTS:
        raise CallError(f"{path} is damaged: its result is {found.get('result')!r}, expected {', '.join(RESULTS)}")
    return found


def certificate(name: str) -> dict[str, Any] | None:
    """The stored certificate of a method."""
    path = find(CERTIFICATES, f"{name}.json")
    found = read(path) if path else None
    if found is not None and not isinstance(found.get("certified"), bool):
        raise CallError(f"{path} is damaged: it does not say whether {name} is certified; remove it or make it again")
    return found


def summary(method: Method) -> dict[str, Any]:
    """What the catalogue shows of a method: identities that tests showed to hold, evidence and certificate (None if not stored)."""
    found, proof = evidence(method.name), certificate(method.name)
    identities = (proof or {}).get("identities") or {}
    return {
        "identities": [
            {"test": t["test"], "text": t["text"]} for t in identities.get("tests", []) if t.get("outcome") == "passed"
        ],
        "evidence": None if found is None else {k: found.get(k) for k in EVIDENCE_SHOWN},
        "certificate": None if proof is None else {
            **{k: proof.get(k) for k in CERTIFICATE_SHOWN}, "stale": proof.get("fingerprint") != fingerprint(method),
        },
    }  # fmt: skip


def words(method: Method) -> tuple[str, str]:
    """Evidence and certificate in a word each; "-" where nothing is stored."""
    found = summary(method)
    proof = found["certificate"]
    state = "-" if proof is None else "NOT certified" if not proof["certified"] else "stale" if proof["stale"] else "certified"
    return str(found["evidence"]["result"]) if found["evidence"] else "-", state


# -------------------------------------------------------------------- whether it still holds
def fingerprint(method: Method) -> str:
    """Changes with the method's parts and settings, and with the code of its parts; texts and layout do not count."""
    lines = [f"{path} = {_text(leaf.value) if isinstance(leaf.type, Slot) else repr(leaf.value)}" for path, leaf in _leaves(method)]
    files = {f for part in method.parts().values() for f in sources(cast(Hashable, type(part)))}
    digests = sorted(hashlib.sha256(skeleton(f.read_text(encoding="utf-8")).encode()).hexdigest() for f in files)
    return hashlib.sha256("\n".join([*lines, *digests]).encode()).hexdigest()[:16]


def skeleton(source: str) -> str:
    """Source code without comments, docstrings, layout, and imports for the type checker alone."""

    class Bare(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if typing else self.generic_visit(node)

        def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
            return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    return ast.unparse(Bare().visit(ast.parse(source)))


def _leaves(method: Method) -> list[tuple[str, Any]]:
    return sorted(method_leaves(method).items())


def _text(value: Any) -> str:
    many = value if isinstance(value, tuple) else () if value is None else (value,)
    return "+".join(f"{p.name} {type(p).__qualname__}" for p in many)


@functools.cache
def sources(cls: Hashable) -> frozenset[Path]:
    """Files that a part's behaviour is written in: those of its class and bases, and the parts' modules that they import."""
    assert isinstance(cls, type)
    found: dict[str, Path] = {}
    todo = [c.__module__ for c in cls.__mro__ if issubclass(c, Part) and c is not Part]
    while todo:
        name = todo.pop()
        file = getattr(sys.modules.get(name), "__file__", None)  # None: a part that was typed into a notebook
        if name in found or file is None:
            continue
        found[name] = Path(file)
        for node in ast.walk(ast.parse(found[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polopt.parts."):
                todo.append(node.module or "")
    return frozenset(found.values())


__all__ = [
    "certificate", "evidence", "find", "fingerprint", "folders", "home", "read", "registered", "skeleton", "summary", "words",
]  # fmt: skip
