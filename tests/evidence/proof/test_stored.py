"""Stored evidence and certificates: where they are found, damage, staleness, and how the catalogue shows them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polopt.cli import main
from polopt.cli.show import columns
from polopt.errors import CallError
from polopt.evidence.proof import stored
from polopt.parts.surrogate.clip import Clip
from polopt.registry import all_methods, get_method, load_object

EVIDENCE = {
    "result": "undecided", "sentence": "undecided: a small gap", "claim": "c", "tested": "t", "baseline": "trpo",
    "date": "2026-01-02", "difference": {"mean": 0.1, "low": -0.2, "high": 0.4},
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, without a repository around the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stored, "folders", lambda: [Path.cwd() / "evidence", tmp_path / "package"])
    return tmp_path


def put(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))


def certificate(name: str, **changes: Any) -> dict[str, Any]:
    found = {
        "certified": True, "line": f"{name}: certified", "date": "2026-01-02", "fingerprint": stored.fingerprint(get_method(name)),
        "identities": {"tests": [{"test": "tests/a.py::test_x", "text": "x holds", "cases": 3, "outcome": "passed"}]},
    }  # fmt: skip
    return {**found, **changes}


def test_a_test_that_did_not_pass_shows_no_identity(here: Path) -> None:
    good = {"test": "tests/a.py::test_x", "text": "x holds", "cases": 1, "outcome": "passed"}
    tests = [{**good, "test": "b", "outcome": "failed"}, good, {**good, "test": "c", "outcome": "skipped"}]
    put(here / "evidence" / "certificates" / "ppo.json", certificate("ppo", certified=False, identities={"tests": tests}))
    assert stored.summary(get_method("ppo"))["identities"] == [{"test": "tests/a.py::test_x", "text": "x holds"}]


def test_nothing_stored(here: Path) -> None:
    assert stored.summary(get_method("ppo")) == {"identities": [], "evidence": None, "certificate": None}
    assert stored.words(get_method("ppo")) == ("-", "-")
    assert stored.home() == here / "evidence"


def test_what_is_here_comes_before_what_is_installed(here: Path) -> None:
    put(here / "package" / "ppo.json", EVIDENCE)
    assert stored.words(get_method("ppo"))[0] == "undecided"
    put(here / "evidence" / "ppo.json", {**EVIDENCE, "result": "shown"})
    assert stored.words(get_method("ppo"))[0] == "shown"
    put(here / "evidence" / "certificates" / "ppo.json", certificate("ppo"))
    found = stored.summary(get_method("ppo"))
    assert found["identities"] == [{"test": "tests/a.py::test_x", "text": "x holds"}]
    assert found["certificate"]["stale"] is False
    assert stored.words(get_method("ppo"))[1] == "certified"


def test_the_repository_and_the_package_are_places() -> None:
    here, repository, package = stored.folders()
    assert here == Path.cwd() / "evidence"
    assert repository == Path(stored.__file__).parents[4] / "evidence"
    assert package.resolve() == repository.resolve()  # a link: what a wheel ships


def test_new_results_go_to_the_repository_only_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = stored.repository()
    assert root is not None
    for place, wanted in ((tmp_path, tmp_path), (root, root), (root / "docs", root)):
        monkeypatch.chdir(place)
        assert stored.home() == wanted / "evidence"
    (tmp_path / "evidence").mkdir()
    monkeypatch.chdir(tmp_path)
    assert stored.home() == tmp_path / "evidence"


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_damaged_files_are_named(here: Path, text: str) -> None:
    put(here / "evidence" / "ppo.json", text)
    with pytest.raises(CallError, match=r"evidence/ppo\.json is damaged"):
        stored.summary(get_method("ppo"))


def test_files_with_other_content_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(here / "evidence" / "ppo.json", {"result": "probably"})
    with pytest.raises(CallError, match="'probably', expected shown, not shown, undecided"):
        stored.evidence("ppo")
    (here / "evidence" / "ppo.json").unlink()
    put(here / "evidence" / "certificates" / "ppo.json", {"certified": "yes"})
    assert main(["methods"]) == 2
    assert "certificates/ppo.json is damaged" in capsys.readouterr().err


# -------------------------------------------------------------------- staleness
def test_a_fingerprint_is_of_parts_and_settings() -> None:
    ppo = get_method("ppo")
    assert stored.fingerprint(ppo) == stored.fingerprint(ppo.but("ppo", claim="another"))
    for changed in (ppo.but("ppo", epochs=3), ppo.set("surrogate.high", 0.3), ppo.but("ppo", surrogate=SubClip())):
        assert stored.fingerprint(changed) != stored.fingerprint(ppo)
    assert len({stored.fingerprint(m) for m in all_methods().values()}) == len(all_methods())


@dataclass(frozen=True)
class SubClip(Clip):
    """The same, under another name."""


def test_a_fingerprint_is_of_the_source_of_parts(tmp_path: Path) -> None:
    text = (
        "from dataclasses import dataclass\nfrom polopt.parts.surrogate.clip import Clip\nfrom polopt import method\n"
        "@dataclass(frozen=True)\nclass Mine(Clip):\n    pass\nMINE = method('ppo').but('mine', surrogate=Mine())\n"
    )
    found = []
    for name, body in (("one", text), ("two", text), ("three", text.replace("pass", "__call__ = Clip.__call__"))):
        path = tmp_path / name / "my.py"
        put(path, body)
        found.append(stored.fingerprint(load_object(f"{path}:MINE")))
        assert path in stored.sources(type(load_object(f"{path}:MINE").surrogate))
    assert found[0] == found[1] != found[2]


CODE = '''
class P:
    """Doc."""

    def f(self, x):
        # why
        if x < 0:
            return f"got {x}"
        return x + 1
'''
TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from polopt.method import Method\n"


def test_texts_and_layout_are_no_code() -> None:
    same = CODE.replace("Doc.", "Other words.").replace("# why", "# because")
    assert stored.skeleton(CODE) == stored.skeleton(same) == stored.skeleton(CODE.replace("x + 1", "(x +\n     1)"))
    assert stored.skeleton(TYPED + CODE) == stored.skeleton(TYPED.replace("polopt.method", "polopt.update") + CODE)
    for before, after in (("x + 1", "x - 1"), ("x < 0", "x <= 0"), ("def f", "def g"), ("got {x}", "got {x!r}")):
        assert stored.skeleton(CODE) != stored.skeleton(CODE.replace(before, after))


def test_sources_follow_imports_between_parts() -> None:
    names = {p.name for p in stored.sources(type(get_method("ppo").advantage))}
    assert {"gae.py", "scan.py"} <= names


@pytest.mark.parametrize(
    ("changes", "word"),
    [({}, "certified"), ({"fingerprint": "0"}, "stale"), ({"certified": False, "fingerprint": "0"}, "NOT certified")],
)
def test_the_catalogue_shows_the_state(here: Path, changes: dict[str, Any], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(here / "evidence" / "certificates" / "ppo.json", certificate("ppo", **changes))
    put(here / "evidence" / "ppo.json", EVIDENCE)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(x for x in lines if x.split()[0] == "ppo")
    assert line.endswith(f"undecided  {word}")
    assert line.startswith("      ppo  ") or line.startswith(" ")  # its place in the tree
    assert max(map(len, lines)) <= 132
    assert len({x.index("1707.06347") for x in lines if "1707.06347" in x} | {lines[0].index("paper")}) == 1


def test_the_catalogue_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(here / "evidence" / "certificates" / "ppo.json", certificate("ppo"))
    put(here / "evidence" / "ppo.json", EVIDENCE)
    assert main(["methods", "--json"]) == 0
    found = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    ppo, grpo = found["ppo"], found["grpo"]
    assert {"name", "card", "paper", "family", "parent", "identities", "evidence", "certificate", "settings"} <= ppo.keys()
    assert (ppo["card"], ppo["paper"], ppo["family"], ppo["parent"]) == (250, "1707.06347", "onpolicy", "trpo")
    assert ppo["identities"] == [{"test": "tests/a.py::test_x", "text": "x holds"}]
    assert ppo["evidence"]["result"] == "undecided"
    assert ppo["evidence"]["difference"] == {"mean": 0.1, "low": -0.2, "high": 0.4}
    assert ppo["certificate"]["certified"] is True
    assert (grpo["card"], grpo["identities"], grpo["evidence"], grpo["certificate"]) == (None, [], None, None)


def test_columns_are_cut_where_they_are_widest() -> None:
    text = columns([("a", "x" * 50, "y" * 10), ("bb", "z", "w")], most=40)
    assert text.splitlines() == ["a   " + "x" * 23 + "…  " + "y" * 10, "bb  z" + " " * 25 + "w"]
    assert columns([("a", "b")]) == "a  b"
