"""Miniature experiments: numbers, words, staleness, running and resuming, checking, and what the library itself stores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polopt
from polopt import CallError, PoloptError, registry
from polopt.claim import Miniature
from polopt.cli import main
from polopt.evidence.compare.folders import code_of
from polopt.evidence.compare.results import RunResult
from polopt.evidence.compare.statistics import Estimate
from polopt.evidence.proof import miniature, stored
from polopt.evidence.proof.gather import Evidence
from polopt.methods.onpolicy.reinforce import REINFORCE
from polopt.overrides import resolve
from polopt.parts.advantage.monte_carlo import MonteCarlo

MINE = '''
"""A method of somebody's own."""
from polopt.claim import Miniature
from polopt.methods.onpolicy.reinforce import REINFORCE
from polopt.parts.advantage.monte_carlo import MonteCarlo

SMALL = Miniature("table:arms", "300-decisions", "Learns less from little.", seeds=2, points=3, reduce="auc", settings={"lr": 0.1})
MINE = REINFORCE.but("mine", advantage=MonteCarlo(gamma=0.9), miniature=SMALL)
'''
SMALL = Miniature("table:arms", "300-decisions", "It learns.", seeds=3, points=3)


def run(score: list[float], seed: int = 0, status: Any = "done", start: float = 0.0) -> RunResult:
    """A run evaluated at even distances."""
    spent = start + np.arange(len(score), dtype=np.float64)
    return RunResult("x", seed, status, Path("nowhere"), spent, np.array(score), peak_rss=7)


def of(values: list[float], **more: Any) -> list[RunResult]:
    """Runs of the seeds 0, 1, ... that end at these scores, from 0."""
    return [run([0.0, v], seed, **more) for seed, v in enumerate(values)]


# -------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("reduce", "expected"),
    [("final", 4.0), ("auc", (0 / 2 + 6 + 10 + 7 + 4 / 2) / 4), ("best", 10.0), ("lowest", 0.0), ("drops", 2.0)],
)
def test_a_run_becomes_one_number(reduce: Any, expected: float) -> None:
    """0, 6, 10, 7, 4: two falls of 3, each more than a fifth of the range 10."""
    assert miniature.number(run([0, 6, 10, 7, 4]), replace(SMALL, reduce=reduce)) == pytest.approx(expected)


def test_drops_are_of_more_than_a_fifth_of_the_range() -> None:
    m = replace(SMALL, reduce="drops")
    assert miniature.number(run([0, 10, 8, 10, 7.9]), m) == 1
    assert miniature.number(run([3, 3, 3]), m) == 0


def test_scores_that_are_no_numbers_are_left_out_and_a_run_that_ends_with_one_has_none() -> None:
    assert miniature.number(run([1, math.nan, 2]), SMALL) == 2
    for reduce in ("final", "auc", "best", "lowest", "drops"):
        assert math.isnan(miniature.number(run([1, 2, math.nan]), replace(SMALL, reduce=reduce)))
    assert math.isnan(miniature.number(run([math.nan]), SMALL))
    assert math.isnan(miniature.number(run([]), SMALL))
    assert miniature.number(run([1.0]), replace(SMALL, metric="peak_rss")) == 7


def test_before_training_counts_only_if_it_was_recorded() -> None:
    assert miniature.untrained(run([0.25, 1]), SMALL) == 0.25
    assert math.isnan(miniature.untrained(run([0.25, 1], start=10.0), SMALL))


# -------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("expect", "margin", "low", "high", "word"),
    [
        ("higher", 0.0, 0.1, 0.3, "shown"),
        ("higher", 0.0, -0.1, 0.3, "undecided"),
        ("higher", 0.0, -0.3, -0.1, "not shown"),
        ("higher", 0.0, 0.0, 0.0, "not shown"),  # every seed equal: no more than the baseline
        ("higher", 0.2, 0.1, 0.3, "undecided"),
        ("higher", 0.2, 0.05, 0.2, "not shown"),
        ("higher", 0.2, 0.21, 0.3, "shown"),
        ("lower", 0.0, -0.3, -0.1, "shown"),
        ("lower", 0.0, -0.3, 0.1, "undecided"),
        ("lower", 0.0, 0.1, 0.3, "not shown"),
        ("lower", 0.2, -0.3, -0.1, "undecided"),
        ("lower", 0.2, -0.15, 0.1, "not shown"),
        ("not worse", 0.2, -0.1, 0.3, "shown"),
        ("not worse", 0.2, -0.3, 0.3, "undecided"),
        ("not worse", 0.2, -0.4, -0.3, "not shown"),
        ("not worse", 0.0, 0.0, 0.0, "shown"),  # every seed equal: no worse than the baseline
        ("not worse", 0.2, -0.2, -0.2, "shown"),
    ],
)
def test_an_interval_becomes_a_word(expect: Any, margin: float, low: float, high: float, word: str) -> None:
    m = replace(SMALL, expect=expect, margin=margin)
    assert miniature.judge(Estimate((low + high) / 2, low, high), m) == word


def test_without_an_interval_nothing_is_decided() -> None:
    assert miniature.judge(Estimate(5.0, None, None), SMALL) == "undecided"


def judged(mine: list[RunResult], theirs: list[RunResult], **changes: Any) -> dict[str, Any]:
    """A result against REINFORCE."""
    method = REINFORCE.but("mine", advantage=MonteCarlo(gamma=0.9), miniature=replace(SMALL, **changes))
    return miniature.weigh(method, mine, theirs)


def test_differences_are_those_of_paired_seeds() -> None:
    """1, 2, 3 more on the same seeds: mean 2, deviation 1, t(2) = 4.3027: 2 +- 4.3027 / sqrt 3."""
    found = judged(of([11, 22, 33]), of([10, 20, 30]))
    half = 4.302652729911275 / math.sqrt(3)
    assert found["difference"]["mean"] == pytest.approx(2)
    assert [found["difference"]["low"], found["difference"]["high"]] == pytest.approx([2 - half, 2 + half])
    assert found["result"] == "undecided"
    assert found["arms"]["mine"]["values"] == {"0": 11, "1": 22, "2": 33}
    assert judged(of([11, 21.1, 30.9]), of([10, 20, 30]))["result"] == "shown"


def test_failed_seeds_are_named_and_left_out_and_a_method_that_failed_is_never_shown() -> None:
    good, bad = of([11, 21.1, 30.9]), [run([], 3, "failed")]
    fallen = judged([*good, *bad], of([10, 20, 30, 40]))
    assert (fallen["result"], fallen["pairs"]) == ("undecided", 3)
    assert list(fallen["arms"]["mine"]["failed"]) == ["3"]
    baseline = judged(of([11, 21.1, 30.9, 41]), [*of([10, 20, 30]), *bad])
    assert (baseline["result"], baseline["pairs"]) == ("shown", 3)
    assert list(baseline["arms"]["reinforce"]["failed"]) == ["3"]
    nothing = judged([replace(r, status="failed") for r in good], of([1, 2, 3]))
    assert (nothing["result"], nothing["pairs"]) == ("undecided", 0)


def test_a_root_is_compared_with_itself_before_training() -> None:
    method = replace(REINFORCE, name="root", miniature=SMALL)
    assert [a.name for a in miniature.arms(method)] == ["root"]
    runs = [run([0.5, 0.8], 0), run([0.5, 0.9], 1), run([0.5, 0.85], 2)]
    found = miniature.weigh(method, runs, runs)
    assert found["result"] == "shown"
    assert found["difference"]["mean"] == pytest.approx(0.35)
    assert found["arms"]["untrained"]["values"] == {"0": 0.5, "1": 0.5, "2": 0.5}


def test_the_sentence_says_what_was_found_and_what_was_expected() -> None:
    method = REINFORCE.but("mine", advantage=MonteCarlo(gamma=0.9), miniature=replace(SMALL, expect="not worse", margin=0.02))
    found = miniature.weigh(method, of([1, 2, 3]), of([1, 2, 3]))
    said = "mine against reinforce, final score on table:arms after 300-decisions: +0 [0, 0] "
    assert miniature.sentence(method, found) == said + "(at most 0.02 worse expected; 3 paired seeds)"


# -------------------------------------------------------------------- what makes a result stale
def child(doc: str = "", gamma: float = 0.9, **changes: Any) -> Any:
    return REINFORCE.but("mine", advantage=MonteCarlo(gamma=gamma), doc=doc, miniature=replace(SMALL, **changes))


def test_the_fingerprint_follows_settings_and_not_texts() -> None:
    base = miniature.fingerprint(child())
    assert miniature.fingerprint(child(doc="Other words.", claim="In other words.")) == base
    others = [
        child(gamma=0.8),
        child(seeds=4),
        child(budget="400-decisions"),
        child(margin=0.1),
        child(expect="lower"),
        child(points=4),
    ]
    others += [child(settings={"lr": 0.2}), child(own={"lr": 0.2}), child(other={"lr": 0.2}), child(baseline="rloo")]
    prints = [miniature.fingerprint(m) for m in others]
    assert len({base, *prints}) == len(others) + 1


def as_stored(method: Any) -> dict[str, Any]:
    m = miniature.miniature_of(method)
    settings = {a.name: {"settings": miniature.values(miniature.resolved(a, m))} for a in miniature.arms(method)}
    found: dict[str, Any] = json.loads(json.dumps({"miniature": miniature.declared(m), "arms": settings}))
    return found


def test_stale_results_say_what_has_changed() -> None:
    known = as_stored(child())
    assert miniature.stale(child(doc="Other words.", claim="Others."), known) == []
    assert miniature.stale(child(gamma=0.8), known) == ["mine's advantage.gamma was 0.9, is 0.8"]
    assert "the miniature's seeds was 3, is 4" in miniature.stale(child(seeds=4), known)
    assert "reinforce's updates.policy.rule.lr was 0.05, is 0.2" in miniature.stale(child(other={"lr": 0.2}), known)
    assert miniature.stale(child(baseline="rloo"), known)
    # a setting that the library has only had since then changes nothing
    del known["arms"]["mine"]["settings"]["advantage.gamma"]
    assert miniature.stale(child(gamma=0.8), known) == []
    assert miniature.stale(child(), {"result": "shown"})


OWN = """
from dataclasses import dataclass
from polopt.claim import Miniature
from polopt.methods.onpolicy.reinforce import REINFORCE
from polopt.parts.surrogate.score import ScoreFunction

@dataclass(frozen=True)
class Own(ScoreFunction):
    def __call__(self, now, advantage):
        return -1.0 * advantage * now["logp"]

MINE = REINFORCE.but("mine", surrogate=Own(), miniature=Miniature("table:arms", "300-decisions", "It learns."))
"""


def test_a_part_of_ones_own_that_was_rewritten_makes_the_result_stale(tmp_path: Path) -> None:
    for name, text in (("old.py", OWN), ("same.py", OWN), ("new.py", OWN.replace("-1.0", "-2.0"))):
        (tmp_path / name).write_text(text)
    old = polopt.method(f"{tmp_path}/old.py:MINE")
    known = as_stored(old)
    arm = next(a for a in miniature.arms(old) if a.name == "mine")
    known["arms"]["mine"]["code"] = code_of(miniature.resolved(arm, miniature.miniature_of(old)))
    assert miniature.stale(polopt.method(f"{tmp_path}/same.py:MINE"), known) == []
    assert miniature.stale(polopt.method(f"{tmp_path}/new.py:MINE"), known) == ["the code of mine's own parts has changed"]


# -------------------------------------------------------------------- running
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's method whose evidence was gathered."""
    where = tmp_path_factory.mktemp("evidence")
    (where / "mine.py").write_text(MINE)
    found = Evidence(where / "evidence", runs=where / "runs", jobs=2).gather(f"{where}/mine.py:MINE")
    assert found.made
    return where


def work(place: Path, **more: Any) -> Evidence:
    return Evidence(place / "evidence", runs=place / "runs", jobs=2, **more)


def test_a_result_is_stored_with_everything_that_is_needed_to_judge_and_to_repeat_it(place: Path) -> None:
    found = json.loads((place / "evidence/mine.json").read_text())
    assert found["result"] in stored.RESULTS
    assert found["tested"] == "Learns less from little."
    assert (found["task"], found["baseline"], found["seeds"]) == ("table:arms", "reinforce", [0, 1])
    assert set(found["arms"]) == {"mine", "reinforce"}
    for arm in found["arms"].values():
        assert set(arm["values"]) == {"0", "1"}
        assert arm["low"] <= arm["iqm"] <= arm["high"]
        assert arm["failed"] == {}
        assert arm["settings"]["evaluate.points"] == 3
    assert found["arms"]["mine"]["settings"]["updates.policy.rule.lr"] == 0.1  # what the miniature sets holds for both
    gap = found["difference"]
    assert gap["mean"] == pytest.approx(
        np.mean([found["arms"]["mine"]["values"][s] - found["arms"]["reinforce"]["values"][s] for s in "01"])
    )
    assert found["core_seconds"] > 0
    assert found["versions"]["torch"]
    assert found["hardware"]["cpu_count"]
    assert found["command"].endswith("mine.py:MINE --again")
    assert len(found["date"]) == 10


def test_a_present_result_is_left_as_it_is_and_finished_runs_are_never_run_again(place: Path) -> None:
    name, path = f"{place}/mine.py:MINE", place / "evidence/mine.json"
    before = path.stat().st_mtime_ns
    assert not work(place).gather(name).made
    assert path.stat().st_mtime_ns == before
    runs = sorted(place.glob("runs/*/runs/*/s*/metrics.jsonl"))
    assert len(runs) == 4
    kept, old = [r.stat().st_mtime_ns for r in runs], json.loads(path.read_text())
    path.unlink()
    again = work(place).gather(name)
    assert again.made
    assert [r.stat().st_mtime_ns for r in runs] == kept
    assert again.result == old


def test_a_killed_experiment_goes_on_with_what_is_missing_and_shared_arms_are_run_once(place: Path) -> None:
    """Another child of the same parent finds the parent's runs; of its own one is missing."""
    runs = {r: r.stat().st_mtime_ns for r in place.glob("runs/*/runs/*/s*/metrics.jsonl")}
    other = REINFORCE.but("other", advantage=MonteCarlo(gamma=0.7), miniature=replace(SMALL, seeds=2, settings={"lr": 0.1}))
    assert work(place).gather(other).result["arms"].keys() == {"other", "reinforce"}
    new = set(place.glob("runs/*/runs/*/s*/metrics.jsonl")) - runs.keys()
    assert {r.parent.parent.name.rpartition("-")[0] for r in new} == {"other"}
    assert {r: r.stat().st_mtime_ns for r in runs} == runs


def test_a_check_says_whether_the_word_is_the_same_and_by_how_much_numbers_moved(place: Path, tmp_path: Path) -> None:
    name, path = f"{place}/mine.py:MINE", place / "evidence/mine.json"
    whole = path.read_text()
    elsewhere = Evidence(place / "evidence", runs=tmp_path / "runs", jobs=2)
    found = elsewhere.check(name)
    assert found.holds
    assert found.identical
    assert not found.stale
    assert "bit-identical" in str(found)
    forged = json.loads(whole)
    forged["result"] = "shown" if forged["result"] != "shown" else "not shown"
    forged["arms"]["mine"]["values"]["1"] += 0.25
    forged["arms"]["mine"]["settings"]["advantage.gamma"] = 0.5
    path.write_text(json.dumps(forged))
    try:
        other = elsewhere.check(name)
        assert not other.holds
        assert other.moved == pytest.approx(0.25)
        assert other.stale == ["mine's advantage.gamma was 0.5, is 0.9"]
        assert "does not hold" in str(other)
        assert elsewhere.due(polopt.method(name)).startswith("stale")
    finally:
        path.write_text(whole)


def test_the_code_of_ones_own_parts_is_stored(place: Path) -> None:
    (place / "own.py").write_text(OWN.replace('"It learns."', '"It learns.", seeds=2, points=2').replace('"mine"', '"own"'))
    name = f"{place}/own.py:MINE"
    arms = work(place).gather(name).result["arms"]
    assert arms["own"]["code"]
    assert "code" not in arms["reinforce"]
    assert work(place).due(polopt.method(name)) == ""


def test_a_method_made_in_python_with_its_root_as_baseline(place: Path) -> None:
    """The baseline is the method before training: the exact score of the untrained policy, equal on all seeds."""
    root = replace(REINFORCE, name="root", miniature=replace(SMALL, seeds=2))
    found = work(place).gather(root).result
    assert found["baseline"] == "untrained"
    assert len(set(found["arms"]["untrained"]["values"].values())) == 1
    assert found["arms"]["root"]["values"].keys() == {"0", "1"}


# -------------------------------------------------------------------- refusals and the command line
def test_a_method_without_a_miniature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="bare declares no miniature"):
        Evidence(tmp_path).gather(REINFORCE.but("bare"))
    with pytest.raises(CallError, match="bare declares no miniature"):
        polopt.check_evidence(REINFORCE.but("bare"), out=tmp_path)


def test_results_of_methods_of_ones_own_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Evidence().path(REINFORCE.but("mine")) == tmp_path / "evidence/mine.json"
    assert Evidence().path(replace(REINFORCE, miniature=None)) == tmp_path / "evidence/reinforce.json"
    assert Evidence().path(REINFORCE) == stored.home() / "reinforce.json"
    assert Evidence("x").path(REINFORCE) == Path("x/reinforce.json")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(stored, "home", lambda: tmp_path / "elsewhere")
    assert Evidence().path(registry.register(REINFORCE.but("mine"))) == tmp_path / "evidence/mine.json"


def test_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(place / "evidence")
    name = f"{place}/mine.py:MINE"
    assert main(["evidence", name, "--out", out]) == 0
    assert "is of the present experiment" in capsys.readouterr().out
    assert main(["evidence"]) == 2
    assert main(["evidence", name, "--all"]) == 2
    assert main(["evidence", name, "--check", "--again"]) == 2
    assert main(["evidence", name, "--check", "--out", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text("{")
    assert main(["evidence", name, "--out", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert main(["evidence", name, "--jobs", "0"]) == 2
    assert "--jobs 0: expected at least 1" in capsys.readouterr().err


def test_a_damaged_result_is_made_again(place: Path, tmp_path: Path) -> None:
    name = f"{place}/mine.py:MINE"
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(CallError, match="damaged"):
        Evidence(tmp_path, runs=place / "runs").gather(name)
    found = Evidence(tmp_path, runs=tmp_path / "runs", jobs=2, again=True).gather(name)
    assert found.made
    assert stored.read(tmp_path / "mine.json") == found.result


def test_an_experiment_without_a_pair_of_numbers_is_not_stored(tmp_path: Path) -> None:
    odd = REINFORCE.but("odd", miniature=replace(SMALL, seeds=2, points=2, metric="eval_skore"))
    with pytest.raises(PoloptError, match=r"odd gave no pair of numbers.*eval_skore"):
        Evidence(tmp_path / "evidence", runs=tmp_path / "runs", jobs=2).gather(odd)
    assert not (tmp_path / "evidence").exists()


def test_what_the_library_ships_is_checked_wherever_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def carry_out(self: Evidence, method: Any, given: str | None) -> dict[str, Any]:
        asked.append(method.name)
        return dict(stored.evidence("spo") or {})

    monkeypatch.setattr(Evidence, "carry_out", carry_out)
    assert Evidence().check("spo").identical
    assert asked == ["spo"]


# -------------------------------------------------------------------- the library's own
@pytest.mark.parametrize("name", list(polopt.methods()))
def test_every_method_has_a_miniature_that_resolves(name: str) -> None:
    method = polopt.method(name)
    m = miniature.miniature_of(method)
    for arm in miniature.arms(method, name):
        resolve(
            polopt.method(arm.method) if isinstance(arm.method, str) else arm.method, m.task, {**arm.settings, "budget": m.budget}
        )
    assert m.claim.endswith(".")
    assert m.seeds >= 5
    assert m.expect != "not worse" or m.margin > 0
    assert miniature.fingerprint(method)


@pytest.mark.parametrize("name", list(polopt.methods()))
def test_stored_evidence_is_of_the_present_experiment(name: str) -> None:
    root = stored.repository()
    path = (root or Path()) / "evidence" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no evidence of {name} is stored; 'make evidence' gathers it")
    found, method = stored.read(path), polopt.method(name)
    assert found["method"] == name
    assert found["result"] in stored.RESULTS
    assert miniature.stale(method, found) == [], f"run 'polopt evidence {name}'"
    assert found["sentence"] == miniature.sentence(method, found)
