"""Faults for source that trains policies: each is one changed expression, found in the syntax tree and put back as text.

`faults(path, source)` yields them. What only speaks (docstrings, equations, messages of errors) and what only declares types
(annotations) stays as it is; so do assertions, which are there for the type checker.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from places import Place, header, mentions, name_of, places, written

KINDS = {
    "sign": "flipped sign",
    "mask": "dropped or inverted mask",
    "detach": "missing detach, no_grad or copy",
    "time": "off by one in time, wrong axis",
    "normaliser": "wrong normaliser",
    "bound": "swapped or moved bound",
    "constant": "changed constant, dropped factor or function",
    "logic": "wrong condition",
    "view": "statistic of another view",
    "default": "other default",
    "declared": "undeclared need or requirement",
    "step": "dropped step or check",
}

#: Names that stand for each other's opposite, and what kind of fault it is to confuse them.
SWAPS = {
    kind: {a: b for x, y in pairs for a, b in ((x, y), (y, x))}
    for kind, pairs in {
        "normaliser": [("mean", "sum"), ("std", "var"), ("decisions", "rows"), ("group", "batch")],
        "bound": [("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("low", "high")],
        "mask": [("terminated", "truncated")],
        "constant": [("zeros_like", "ones_like"), ("zeros", "ones")],
        "logic": [("any", "all")],
    }.items()
}
SWAP = {name: (kind, other) for kind, pairs in SWAPS.items() for name, other in pairs.items()}
READ = {"low", "high", "decisions", "rows", "terminated", "truncated"}
CALLED = set(SWAP) - READ
#: Methods whose result may be replaced by what they were called on.
DROPPED = {
    **dict.fromkeys(("detach", "clone"), "detach"),
    **dict.fromkeys(("exp", "log", "sqrt", "square", "abs", "lerp"), "constant"),
    **dict.fromkeys(("clamp",), "bound"),
    **dict.fromkeys(("masked_fill",), "mask"),
    **dict.fromkeys(("flip",), "time"),
}
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
VIEWS = {"now": "old", "old": "behaviour", "ref": "old", "behaviour": "old", "stepped": "old"}
DECLARING = ("needs", "requires", "reads")


@dataclass(frozen=True)
class Fault:
    """One changed place: `lines` are those of its statement; of its class (or file), if it is read when the module is imported."""

    file: str
    kind: str
    where: str
    line: int
    lines: range
    before: str
    after: str
    source: str = field(repr=False)

    @property
    def id(self) -> str:
        """The same as long as the statement and its function are, wherever they stand in the file."""
        words = "\0".join((self.file, self.where, self.kind, " ".join(self.before.split()), " ".join(self.after.split())))
        return hashlib.sha256(words.encode()).hexdigest()[:10]


# -------------------------------------------------------------------- the faults
Found = Iterator[tuple[str, ast.AST]]


def renamed(node: ast.expr, name: str) -> ast.expr:
    if isinstance(node, ast.Attribute):
        return ast.Attribute(node.value, name, ast.Load())
    return ast.Name(name, ast.Load())


def numbers(x: float) -> list[float]:
    """Other numbers to stand for `x`."""
    if isinstance(x, bool):
        return []
    if isinstance(x, int):
        return {0: [1], 1: [0, 2]}.get(x, [x + 1])
    return [1.0] if x == 0 else [2 * x, 0.0] if x == 1 else [2 * x]


def allowed(annotation: ast.AST, x: float) -> bool:
    """Whether a number is within the `Range` of a field's annotation: others are refused at once."""
    for n in ast.walk(annotation):
        if isinstance(n, ast.Call) and name_of(n.func) == "Range":
            tests = {"ge": x.__ge__, "gt": x.__gt__, "le": x.__le__, "lt": x.__lt__}
            return all(tests[str(k.arg)](ast.literal_eval(k.value)) is True for k in n.keywords)
    return True


def defaults(value: float | None, annotation: ast.AST) -> list[float]:
    """Another number for a field, near the declared one."""
    tried = [2, 1] if value is None else [value + 1, value - 1] if isinstance(value, int) else [1.5 * value, value / 2, 0.5]
    return [x for x in tried if x != value and allowed(annotation, float(x))][:1]


def on_constant(node: ast.Constant, place: Place) -> Found:
    parent, value = place.parents[-1], node.value
    of = place.inside(ast.AnnAssign)
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub):
        return
    if of is not None and not place.function and isinstance(value, int | float | None) and not isinstance(value, bool):
        for other in defaults(value, of.annotation):
            yield "default", ast.Constant(other)
    elif isinstance(value, bool):
        if not (isinstance(parent, ast.keyword) and parent.arg == "strict"):
            yield "logic", ast.Constant(not value)
    elif isinstance(value, int | float):
        axis = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute) and isinstance(value, int)
        timed = axis or place.inside(ast.Slice) is not None or isinstance(parent, ast.Subscript)
        counted = isinstance(parent, ast.keyword) and parent.arg == "ddof"
        for other in numbers(value):
            yield "time" if timed else "normaliser" if counted else "constant", ast.Constant(other)
    elif isinstance(value, str) and not isinstance(parent, ast.Compare | ast.Dict):
        if value in SWAP:
            yield SWAP[value][0], ast.Constant(SWAP[value][1])
        elif value == "row":
            yield "normaliser", ast.Constant("batch")
        stat, at, view = value.partition("@")
        if at and view in VIEWS:
            yield "view", ast.Constant(f"{stat}@{VIEWS[view]}")
        elif value in ("old", "ref"):
            yield "view", ast.Constant(VIEWS[value])


def on_unary(node: ast.UnaryOp, place: Place) -> Found:
    kinds = {ast.USub: "time" if place.inside(ast.Slice) else "sign", ast.Invert: "mask", ast.Not: "logic"}
    if isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int) and isinstance(node.op, ast.USub):
        yield "time", ast.UnaryOp(node.op, ast.Constant(node.operand.value + 1))  # a place counted from the end
    else:
        yield kinds[type(node.op)], node.operand


def on_binary(node: ast.BinOp, place: Place) -> Found:
    left, op, right = node.left, type(node.op), node.right
    if op in (ast.Add, ast.Sub):
        if any(isinstance(x, ast.JoinedStr) or (isinstance(x, ast.Constant) and isinstance(x.value, str)) for x in (left, right)):
            return
        kind = "time" if place.inside(ast.Slice) else "sign"
        yield kind, ast.BinOp(left, ast.Sub() if op is ast.Add else ast.Add(), right)
        small = isinstance(right, ast.Constant) and isinstance(right.value, float) and 0 < right.value < 1e-3
        if op is ast.Add and (small or name_of(right) == "eps"):
            yield "normaliser", left
    elif op in (ast.Div, ast.Pow):
        yield "normaliser" if op is ast.Div else "constant", left
    elif op is ast.Mult:
        kind = "mask" if mentions(node, "mask", "valid") else "constant"
        yield kind, left
        yield kind, right
    elif op in (ast.BitAnd, ast.BitOr):
        kind = "step" if "report" in (name_of(left), name_of(right)) else "mask"
        yield kind, left
        yield kind, right


def on_compare(node: ast.Compare, place: Place) -> Found:
    for i, op in enumerate(node.ops):
        if isinstance(op, ast.Eq | ast.NotEq) and isinstance(place.parents[-1], ast.IfExp):
            continue  # both branches are tried
        for other in COMPARISONS[type(op)]:
            kind = "bound" if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) else "logic"
            yield kind, ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1 :]], node.comparators)


def on_bool(node: ast.BoolOp, place: Place) -> Found:
    yield "logic", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    for i in range(len(node.values)):
        rest = [*node.values[:i], *node.values[i + 1 :]]
        yield "logic", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def on_choice(node: ast.IfExp, place: Place) -> Found:
    yield "logic", node.body
    yield "logic", node.orelse


def on_call(node: ast.Call, place: Place) -> Found:
    name, args = name_of(node.func), node.args
    if isinstance(node.func, ast.Attribute) and name in DROPPED:
        yield DROPPED[name], node.func.value
    if name == "where" and len(args) == 3:
        yield "mask", args[1]
        yield "mask", args[2]
        yield "mask", ast.Call(node.func, [args[0], args[2], args[1]], [])
    elif name == "keep":
        yield "mask", args[1]
    elif name == "last_valid":
        yield "time", args[0]
    elif name == "range" and len(args) == 1:
        yield "time", ast.Call(node.func, [ast.BinOp(args[0], ast.Sub(), ast.Constant(1))], [])
        yield "time", ast.Call(node.func, [ast.BinOp(args[0], ast.Add(), ast.Constant(1))], [])
    elif name in ("min", "max") and isinstance(node.func, ast.Name):
        for a in args:
            yield "bound", a
    if name in CALLED and name in SWAP:
        yield SWAP[name][0], ast.Call(renamed(node.func, SWAP[name][1]), args, node.keywords)
    for i, k in enumerate(node.keywords):
        if name == "clamp" and k.arg in ("min", "max"):
            other = ast.keyword("max" if k.arg == "min" else "min", k.value)
            yield "bound", ast.Call(node.func, args, [*node.keywords[:i], other, *node.keywords[i + 1 :]])
    for i, (a, b) in enumerate(itertools.pairwise(args)):
        if (name_of(a), name_of(b)) == ("low", "high"):
            yield "bound", ast.Call(node.func, [*args[:i], b, a, *args[i + 2 :]], node.keywords)


def on_name(node: ast.Attribute | ast.Name, place: Place) -> Found:
    name, parent = name_of(node), place.parents[-1]
    if not isinstance(node.ctx, ast.Load) or (isinstance(parent, ast.Call) and parent.func is node):
        return
    if name in READ and not isinstance(parent, ast.Attribute):
        yield SWAP[name][0], renamed(node, SWAP[name][1])
    if name in ("mask", "valid") and not isinstance(parent, ast.BinOp | ast.UnaryOp | ast.keyword):
        if name_of(parent) in ("shape", "device") or (
            isinstance(parent, ast.Call) and name_of(parent.func).endswith(("_like", "keep"))
        ):
            return
        yield "mask", ast.BinOp(node, ast.BitOr(), ast.UnaryOp(ast.Invert(), node))


def on_slice(node: ast.Slice, place: Place) -> Found:
    for part in ("lower", "upper"):
        bound = getattr(node, part)
        if bound is None:
            continue
        bounds = {"lower": node.lower, "upper": node.upper, "step": node.step}
        yield "time", ast.Slice(**{**bounds, part: None})
        if not isinstance(bound, ast.Constant):
            yield "time", ast.Slice(**{**bounds, part: ast.BinOp(bound, ast.Add(), ast.Constant(1))})


def on_set(node: ast.Set, place: Place) -> Found:
    if place.function in DECLARING or not place.function:
        for i in range(len(node.elts)):
            rest = [*node.elts[:i], *node.elts[i + 1 :]]
            yield "declared", ast.Set(rest) if rest else ast.Call(ast.Name("set", ast.Load()), [], [])


def on_if(node: ast.If, place: Place) -> Found:
    if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield "logic", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def on_return(node: ast.Return, place: Place) -> Found:
    function = place.inside(ast.FunctionDef)
    said = ast.unparse(function.returns) if function and function.returns else ""
    tensor = said == "Tensor" or said.startswith("Float[Tensor")
    if tensor and node.value is not None and not isinstance(node.value, ast.UnaryOp | ast.Constant | ast.Lambda):
        yield "sign", ast.Return(ast.UnaryOp(ast.USub(), node.value))


def on_assign(node: ast.AugAssign, place: Place) -> Found:
    other = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.BitOr: ast.BitAnd}[type(node.op)]
    yield "sign" if isinstance(node.op, ast.Add | ast.Sub) else "constant", ast.AugAssign(node.target, other(), node.value)
    yield "step", ast.Pass()


def on_expression(node: ast.Expr, place: Place) -> Found:
    if isinstance(node.value, ast.Call) and name_of(node.value.func) != "register_preset":
        yield "step", ast.Pass()


def on_jump(node: ast.Break | ast.Continue, place: Place) -> Found:
    yield "step", ast.Pass()


def on_field(node: ast.AnnAssign, place: Place) -> Found:
    """Another choice for a text; numbers and truth values change by themselves."""
    value = node.value
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        texts = [n.elts if isinstance(n, ast.Tuple) else [n] for n in choices(node.annotation)]
        others = [e.value for t in texts for e in t if isinstance(e, ast.Constant) and e.value != value.value]
        for other in others[:1]:
            yield "default", ast.AnnAssign(node.target, node.annotation, ast.Constant(other), node.simple)


def choices(annotation: ast.AST) -> list[ast.expr]:
    return [n.slice for n in ast.walk(annotation) if isinstance(n, ast.Subscript) and name_of(n.value) == "Literal"]


RULES: dict[type, Callable[[Any, Place], Found]] = {
    ast.Constant: on_constant, ast.UnaryOp: on_unary, ast.BinOp: on_binary, ast.Compare: on_compare, ast.BoolOp: on_bool,
    ast.IfExp: on_choice, ast.Call: on_call, ast.Attribute: on_name, ast.Name: on_name, ast.Slice: on_slice, ast.Set: on_set,
    ast.If: on_if, ast.Return: on_return, ast.AugAssign: on_assign, ast.Expr: on_expression, ast.Break: on_jump,
    ast.Continue: on_jump, ast.AnnAssign: on_field,
}  # fmt: skip


def kind_at(kind: str, place: Place) -> str:
    """What is wrong with a declaration is its default or what it declares, whatever the changed node is."""
    if place.function in DECLARING or kind == "declared" or (not place.function and kind == "view"):
        return "declared"
    owner = place.inside(ast.AnnAssign) or place.inside(ast.arguments)
    return "default" if not place.function or isinstance(owner, ast.arguments) else kind


def on_decorator(place: Place) -> Found:
    if isinstance(place.node, ast.Call) and name_of(place.node.func) == "no_grad":
        yield "detach", ast.Call(ast.Attribute(ast.Name("torch", ast.Load()), "enable_grad", ast.Load()), [], [])


# -------------------------------------------------------------------- all of them
def faults(file: str, source: str) -> Iterator[Fault]:
    """The faults of a module, each once, in the order of its lines."""
    tree, raw = ast.parse(source), source.encode()
    original = ast.dump(tree)
    seen = {original}
    for place in places(tree):
        node: Any = place.node
        decorator = isinstance(place.parents[-1], ast.FunctionDef) and node in place.parents[-1].decorator_list
        rule = RULES.get(type(node))
        found = on_decorator(place) if decorator else rule(node, place) if rule else iter(())
        for kind, new in found:
            place.put(new)
            wanted = ast.dump(tree)
            place.put(node)
            if wanted in seen:
                continue
            seen.add(wanted)
            changed = written(raw, place, new, wanted)
            if changed is None:
                continue
            statement = place.statement
            lines = range(node.lineno, node.lineno + 1) if decorator else header(statement)
            imported = not place.function or decorator or place.inside(ast.arguments) is not None
            whole: Any = next((n for n in place.parents if isinstance(n, ast.ClassDef | ast.FunctionDef)), None)
            more = changed.count("\n") - source.count("\n")
            yield Fault(
                file=file, kind=kind_at(kind, place), where=place.where, line=getattr(node, "lineno", lines[0]),
                lines=lines if not imported else range(whole.lineno, whole.end_lineno + 1) if whole else range(1, 1 << 20),
                before="\n".join(source.splitlines()[lines[0] - 1 : lines[-1]]),
                after="\n".join(changed.splitlines()[lines[0] - 1 : lines[-1] + more]), source=changed,
            )  # fmt: skip
