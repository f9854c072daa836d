"""The faults that `make mutate` seeds: each kind on toy source, what is left alone, and the judge itself."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
from mutants import KINDS, Fault, faults
from run import table
from suite import FIRST, MOST, ROOT, Coverage

PARTS = sorted((ROOT / "src" / "polopt" / "parts").rglob("*.py"))


def found(source: str) -> list[Fault]:
    return list(faults("toy.py", textwrap.dedent(source)))


def changes(body: str, returns: str = "object") -> set[tuple[str, str]]:
    """(kind, changed expression) of `return body` in a function."""
    source = f"def f(x, y, mask, valid, eps, low, high, totals, n) -> {returns}:\n    return {body}\n"
    return {(f.kind, f.after.strip().removeprefix("return ")) for f in faults("toy.py", source)}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("sign", "-x", "x"),
        ("sign", "x + y", "x - y"),
        ("sign", "x * (y - n)", "x * (y + n)"),
        ("mask", "torch.where(valid, x, y)", "x"),
        ("mask", "torch.where(valid, x, y)", "torch.where(valid, y, x)"),
        ("mask", "keep(x, y)", "y"),
        ("mask", "x.masked_fill(y, 0.0)", "x"),
        ("mask", "x & ~y", "x"),
        ("mask", "x & ~y", "x & y"),
        ("mask", "x * mask", "x"),
        ("mask", "batch.mask.sum()", "(batch.mask | ~batch.mask).sum()"),
        ("mask", "f(x.terminated)", "f(x.truncated)"),
        ("detach", "x.detach() + y", "x + y"),
        ("detach", "x.clone()", "x"),
        ("time", "x[:, 1:]", "x[:, 2:]"),
        ("time", "x[:, :-n]", "x[:, :n]"),
        ("time", "x[:, :n]", "x[:, :]"),
        ("time", "x[0]", "x[1]"),
        ("time", "x[-1]", "x[-2]"),
        ("time", "range(n)", "range(n - 1)"),
        ("time", "x.flip(1)", "x"),
        ("time", "x.sum(1)", "x.sum(0)"),
        ("time", "last_valid(x)", "x"),
        ("normaliser", "x / totals.decisions", "x / totals.rows"),
        ("normaliser", "x / n", "x"),
        ("normaliser", "x / (y + eps)", "x / (y)"),
        ("normaliser", "x.std()", "x.var()"),
        ("normaliser", "x.mean(1)", "x.sum(1)"),
        ("normaliser", "pool(x, 'group')", "pool(x, 'batch')"),
        ("normaliser", "pool(x, ddof=1)", "pool(x, ddof=0)"),
        ("bound", "x.clamp(1 - low, 1 + high)", "x.clamp(1 - high, 1 + high)"),
        ("bound", "f(x, low, high)", "f(x, high, low)"),
        ("bound", "x.clamp(min=1)", "x.clamp(max=1)"),
        ("bound", "x.clamp(min=1)", "x"),
        ("bound", "torch.minimum(x, y)", "torch.maximum(x, y)"),
        ("bound", "x < y", "x <= y"),
        ("bound", "x < y", "x > y"),
        ("constant", "x + 1", "x + 2"),
        ("constant", "0.5 * x", "1.0 * x"),
        ("constant", "n * x", "x"),
        ("constant", "x.exp()", "x"),
        ("logic", "x and y", "x or y"),
        ("logic", "not x", "x"),
        ("logic", "x is None", "x is not None"),
        ("logic", "x if y else n", "n"),
        ("view", "batch.stat('logp@old')", "batch.stat('logp@behaviour')"),
    ],
)
def test_each_kind_is_seeded(kind: str, before: str, after: str) -> None:
    assert (kind, after) in changes(before)


def test_a_tensor_that_is_returned_may_change_its_sign() -> None:
    assert ("sign", "-x.y") in changes("x.y", 'Float[Tensor, "B T"]')
    assert changes("x.y") == set()


PART = '''
"""Adds 1 - 2 of what is below 3."""
import torch
LIMIT = 20.0  # not more

@register_part("surrogate", "toy")
@dataclass(frozen=True)
class Toy(Part):
    """x < y and z."""

    low: Annotated[float, Range(ge=0, le=1), "a < b"] = 0.8
    form: Annotated[Literal["token", "row"], "where"] = "token"
    equation: ClassVar[str] = "a - b" + "c"
    rows: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp@now", "logp@old"})

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "1 2"], bias: float = 0.5) -> Float[Tensor, "1 2"]:
        assert 1 < 2
        if x > LIMIT:
            raise ValueError(f"{x + 1} is " + "too large")
        assert_decisions(x)
        return x

    def describe(self) -> str:
        return "a" if 1 < 2 else "b"
'''


def test_defaults_declarations_and_steps_but_no_words() -> None:
    seen = {(f.kind, f.line, f.after.strip().splitlines()[-1]) for f in found(PART)}
    assert seen == {
        ("default", 4, "LIMIT = 40.0  # not more"),
        ("default", 11, 'low: Annotated[float, Range(ge=0, le=1), "a < b"] = 0.4'),  # 1.2 is out of range
        ("default", 12, "form: Annotated[Literal['token', 'row'], 'where'] = 'row'"),
        ("default", 14, "rows: ClassVar[bool] = False"),
        ("declared", 18, "return frozenset({'logp@old'})"),
        ("declared", 18, "return frozenset({'logp@now'})"),
        ("declared", 18, "return frozenset({\"logp@now\", 'logp@behaviour'})"),
        ("declared", 18, "return frozenset({'logp@old', \"logp@old\"})"),
        ("detach", 20, "@torch.enable_grad()"),
        ("default", 21, 'def __call__(self, x: Float[Tensor, "1 2"], bias: float = 1.0) -> Float[Tensor, "1 2"]:'),
        ("bound", 23, "if x >= LIMIT:"),
        ("bound", 23, "if x < LIMIT:"),
        ("step", 25, "pass"),
        ("sign", 26, "return -x"),
    }


def test_every_fault_is_one_change_and_none_is_seeded_twice() -> None:
    total, ids = 0, []
    for path in PARTS:
        source = path.read_text()
        trees = {ast.dump(ast.parse(source))}
        for f in faults(path.name, source):
            tree = ast.dump(ast.parse(f.source))
            assert tree not in trees, f  # neither the original nor another fault
            trees.add(tree)
            assert f.before != f.after
            assert f.before in source
            assert f.after in f.source
            ids.append(f.id)
            total += 1
    assert len(set(ids)) >= total - 5  # a fault is known by its text, so that verdicts survive edits elsewhere
    assert total > 500


def test_ids_do_not_depend_on_where_the_function_stands() -> None:
    source = "def f(x):\n    return x + 1\n"
    moved = "import math\n\n\n" + source
    assert {f.id for f in found(source)} == {f.id for f in found(moved)}
    assert {f.line for f in found(moved)} == {5}


def test_the_lines_of_a_fault_are_those_of_its_statement() -> None:
    source = """
        def f(x, y):
            if x < y:
                y = 2
            return (
                x
                + y
            )
    """
    lines = {f.kind: f.lines for f in found(source)}
    assert lines == {"bound": range(3, 4), "constant": range(4, 5), "sign": range(5, 9)}


def test_what_is_read_at_import_belongs_to_its_class() -> None:
    source = """
        class Part:
            low: float = 0.2

            def __call__(self, x=2):
                return x + self.low

        LIMIT = 3
    """
    lines = {(f.line, f.kind): f.lines for f in found(source)}
    assert lines[3, "default"] == lines[5, "default"] == range(2, 7)
    assert 10**5 in lines[8, "default"]


def test_tests_that_execute_the_line_are_asked_the_quickest_first() -> None:
    (fault,) = (f for f in found("def f(x):\n    y = 1\n    return -x\n") if f.kind == "sign")
    slow, quick, other, more = (f"tests/parts/a.py::{x}" for x in ("slow", "quick", "other", "more"))
    lines = {3: [slow, quick, more], 2: [other, more]}
    coverage = Coverage({slow: 2.0, quick: 0.1, other: 0.01, more: 0.15}, {"toy.py": lines})
    assert coverage.tests(fault) == [[more, quick, slow]]  # `more` takes longer than `quick`, but executes twice as much


def test_one_fault_costs_a_bounded_time() -> None:
    (fault,) = (f for f in found("def f(x):\n    return -x\n") if f.kind == "sign")
    names = [f"tests/parts/a.py::{i}" for i in range(200)]
    coverage = Coverage(dict.fromkeys(names, MOST / 100), {"toy.py": {2: names}})
    first, rest = coverage.tests(fault)
    assert (len(first), len(first) + len(rest)) == (FIRST, 100)
    (only,) = Coverage({"t": 2 * MOST}, {"toy.py": {2: ["t"]}}).tests(fault)
    assert only == ["t"]


def test_shares_are_counted() -> None:
    rows = [("sign", True), ("sign", False), ("mask", True)]
    assert [line.split() for line in table("kind", rows)] == [
        ["kind", "caught", "of", "share"], ["sign", "1", "2", "50.0%"], ["mask", "1", "1", "100.0%"],
    ]  # fmt: skip
    assert set(KINDS) >= {"sign", "mask"}


@pytest.mark.parametrize("path", [Path("tests/mutation/survivors.yaml")])
def test_verdicts_are_given_in_words(path: Path) -> None:
    import yaml

    for key, entry in (yaml.safe_load((ROOT / path).read_text()) or {}).items():
        verdict = entry["verdict"]
        assert isinstance(key, str), f"write '{key}' in quotes"
        assert verdict.partition(":")[0] in ("equivalent", "harmless"), (key, verdict)
        assert len(verdict.split()) >= 5, (key, verdict)
