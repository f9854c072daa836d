"""Places in a syntax tree where a fault may stand, and how a changed place goes back into the text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

N = TypeVar("N", bound=ast.AST)


@dataclass
class Place:
    """A node with what surrounds it."""

    node: ast.AST
    parents: list[ast.AST]
    put: Callable[[Any], None]

    def inside(self, kind: type[N]) -> N | None:
        """The nearest surrounding node of this kind."""
        return next((p for p in reversed(self.parents) if isinstance(p, kind)), None)

    @property
    def function(self) -> str:
        found = self.inside(ast.FunctionDef)
        return found.name if found else ""

    @property
    def where(self) -> str:
        return ".".join(p.name for p in self.parents if isinstance(p, ast.ClassDef | ast.FunctionDef))

    @property
    def statement(self) -> ast.stmt:
        return next(n for n in (self.node, *reversed(self.parents)) if isinstance(n, ast.stmt))


def silent(node: ast.AST, parent: ast.AST | None, name: str) -> bool:
    """Whether nothing below `node` computes: annotations, texts, imports, assertions, errors."""
    if name in ("annotation", "returns", "decorator_list", "type_comment", "keywords") and not isinstance(parent, ast.Call):
        return not (name == "decorator_list" and "no_grad" in ast.unparse(node))
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert | ast.JoinedStr):
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in ("equation", "kind", "name"):
        return True
    return isinstance(node, ast.FunctionDef) and node.name in ("describe", "__repr__", "__str__")


def places(tree: ast.Module) -> Iterator[Place]:
    """Every place where a fault may stand."""

    def walk(node: ast.AST, parents: list[ast.AST]) -> Iterator[Place]:
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for i, child in enumerate(children):
                if not isinstance(child, ast.AST) or silent(child, node, name):
                    continue

                def put(new: Any, name: str = name, value: Any = value, i: int = i) -> None:
                    if isinstance(value, list):
                        value[i] = new
                    else:
                        setattr(node, name, new)

                path = [*parents, node]
                yield Place(child, path, put)
                yield from walk(child, path)

    yield from walk(tree, [])


def name_of(node: ast.AST | None) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def mentions(node: ast.AST, *words: str) -> bool:
    return any(name_of(n) in words for n in ast.walk(node))


# -------------------------------------------------------------------- back to text
def spliced(source: bytes, node: Any, text: str) -> str:
    """`source` with the text of `node` replaced."""
    lines = source.splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return (source[:start] + text.encode() + source[end:]).decode()


def as_text(node: ast.AST) -> str:
    if isinstance(node, ast.Slice):
        return ast.unparse(ast.Subscript(ast.Name("x"), node))[2:-1]
    return ast.unparse(ast.fix_missing_locations(node))


def written(source: bytes, place: Place, new: ast.AST, wanted: str) -> str | None:
    """The source with `new` in the place, in parentheses where they are needed; None where the text cannot say it."""
    node: Any = place.node
    if isinstance(node, ast.If) and isinstance(new, ast.If):
        node, new = node.test, new.test
    for text in (as_text(new), f"({as_text(new)})"):
        changed = spliced(source, node, text)
        try:
            if ast.dump(ast.parse(changed)) == wanted:
                return changed
        except SyntaxError:
            continue
    return None


def header(statement: Any) -> range:
    """The lines of a statement without those of the statements inside it."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if isinstance(body, list) and body else statement.end_lineno
    return range(statement.lineno, max(last, statement.lineno) + 1)
