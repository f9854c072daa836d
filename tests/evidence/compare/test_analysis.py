"""Comparisons built by hand, weighed: what counts, what is left out, what is warned of, and how often it decides wrongly."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy

from polopt.evidence.compare.analysis import analyse, to_json
from polopt.evidence.compare.results import Comparison, Contestant, RunResult
from polopt.evidence.compare.statistics import estimate, iqm

BUDGET = 1000.0
GRID = np.linspace(0, BUDGET, 5)


def run(name: str, seed: int, final: float, *, start: float = 0.0, grid: np.ndarray = GRID, **fields: Any) -> RunResult:
    """A run whose score rises in a straight line."""
    base: dict[str, Any] = {
        "contestant": name, "seed": seed, "status": "done", "folder": Path(),
        "spent": grid, "score": start + (final - start) * grid / BUDGET,
        "decisions": float(grid[-1]), "seconds": 10.0, "peak_rss": 1_000_000 + seed, "seconds_at": grid / 100,
    }  # fmt: skip
    return RunResult(**(base | fields))


def compare(finals: Mapping[str, Sequence[float]], runs: Sequence[RunResult] = (), **fields: Any) -> Comparison:
    """Contestants with a final score for each seed; `runs` replace or add single runs."""
    made = {(n, s): run(n, s, f) for n, row in finals.items() for s, f in enumerate(row)} | {
        (r.contestant, r.seed): r for r in runs
    }
    base: dict[str, Any] = {
        "task": "text:toy", "budget": BUDGET, "unit": "decisions", "metric": "eval_score", "higher_is_better": True,
        "seeds": tuple(range(max((len(row) for row in finals.values()), default=0))),
        "contestants": tuple(Contestant(n) for n in finals), "runs": tuple(made.values()),
    }  # fmt: skip
    return Comparison(**(base | fields))


A, B = (0.80, 0.82, 0.78, 0.81, 0.84), (0.70, 0.75, 0.69, 0.74, 0.71)


def test_measures_of_a_contestant() -> None:
    found = analyse(compare({"a": A, "b": B})).of("a")
    assert (found.done, found.failed, found.unfinished) == (5, 0, 0)
    assert found.final is not None
    assert found.auc is not None
    assert found.final.values == A
    assert found.final.seeds == (0, 1, 2, 3, 4)
    assert found.final.iqm == estimate(np.array(A))
    assert found.final.mean == pytest.approx(np.mean(A))
    np.testing.assert_allclose(found.auc.values, np.array(A) / 2)  # straight lines from 0
    assert found.decisions_per_second == pytest.approx(100)
    assert (found.peak_rss_max, found.peak_rss_median) == (1_000_004, 1_000_002)
    assert found.curve is not None
    assert found.curve.spent == tuple(GRID)
    np.testing.assert_allclose(found.curve.iqm, iqm(np.array(A)) * GRID / BUDGET)


def test_pair_is_the_paired_difference_of_both_measures() -> None:
    found = analyse(compare({"a": A, "b": B}))
    (pair,) = found.pairs
    test = scipy.stats.ttest_rel(A, B)
    assert (pair.a, pair.b, pair.seeds) == ("a", "b", (0, 1, 2, 3, 4))
    assert pair.final.difference.p == pytest.approx(test.pvalue)
    assert pair.final.decision == pair.auc.decision == "better"
    assert pair.auc.difference.value == pytest.approx(pair.final.difference.value / 2)
    assert pair.final.improvement.value == 1
    assert found.comparisons == 1
    assert found.ranking == ("a", "b")


def test_corrected_intervals_agree_with_decisions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        finals = {f"m{i}": rng.normal(0.5 + 0.03 * i, 0.03, 5) for i in range(4)}
        found = analyse(compare(finals))
        raw = np.array([p.final.difference.p for p in found.pairs], dtype=np.float64)
        assert found.comparisons == 6
        for pair, p in zip(found.pairs, raw, strict=True):
            e = pair.final.corrected
            assert e.low is not None
            assert e.high is not None
            assert (e.low > 0 or e.high < 0) == (pair.final.decision != "undecided")
            assert pair.final.p_adjusted is not None
            assert p <= pair.final.p_adjusted <= min(1, 6 * p) + 1e-12


def test_the_order_of_contestants_turns_signs_and_nothing_else() -> None:
    one, other = analyse(compare({"a": A, "b": B})), analyse(compare({"b": B, "a": A}))
    assert other.pairs[0].a == "b"
    p, q = one.pair("a", "b"), other.pair("a", "b")
    assert p is not None
    assert q is not None
    for x, y in ((p.final, q.final), (p.auc, q.auc)):
        assert (x.decision, x.seeds_needed) == (y.decision, y.seeds_needed)
        for e, f in ((x.difference, y.difference), (x.corrected, y.corrected), (x.improvement, y.improvement)):
            assert (e.value, e.low, e.high) == pytest.approx((f.value, f.low, f.high))
            assert e.p == f.p
    assert one.ranking == other.ranking
    assert one.pair("a", "nobody") is None


def test_shifted_and_scaled_scores_are_decided_alike() -> None:
    rng = np.random.default_rng(1)
    finals = {n: rng.normal(0.5, 0.1, 6) for n in "abc"}
    one = analyse(compare(finals))
    for scale, shift in ((1000.0, -300.0), (-1.0, 0.0)):
        made = compare(finals)
        moved = tuple(dataclasses.replace(r, score=scale * r.score + shift) for r in made.runs)
        other = analyse(dataclasses.replace(made, runs=moved, higher_is_better=scale > 0))
        assert other.ranking == one.ranking
        for p, q in zip(one.pairs, other.pairs, strict=True):
            assert (q.final.decision, q.final.seeds_needed) == (p.final.decision, p.final.seeds_needed)
            assert q.final.difference.value == pytest.approx(scale * p.final.difference.value)
            assert q.final.difference.p == pytest.approx(p.final.difference.p)
            assert q.final.improvement.value == p.final.improvement.value
        for s, t in zip(one.contestants, other.contestants, strict=True):
            assert s.target is not None
            assert t.target is not None
            assert t.target.decisions == pytest.approx(s.target.decisions)


def test_baseline_limits_pairs_and_the_correction() -> None:
    found = analyse(compare({"a": A, "b": B, "c": B, "d": A}, baseline="b"))
    assert [(p.a, p.b) for p in found.pairs] == [("a", "b"), ("c", "b"), ("d", "b")]
    assert found.comparisons == 3


def test_failed_run_counts_as_the_worst_score_seen() -> None:
    crashed = run("a", 2, 0.9, status="failed", error="RuntimeError: boom")
    low = run("b", 1, 0.7, start=-0.25)
    found = analyse(compare({"a": A, "b": B}, [crashed, low]))
    a = found.of("a")
    assert found.worst == -0.25
    assert a.final is not None
    assert a.auc is not None
    assert a.curve is not None
    assert (a.done, a.failed, a.error) == (4, 1, "RuntimeError: boom")
    assert a.final.values[2] == a.auc.values[2] == -0.25
    assert a.curve.runs == 5
    assert found.pairs[0].seeds == (0, 1, 2, 3, 4)
    assert any("1 of 5 runs of a failed (seed 2: RuntimeError: boom)" in w and "-0.25" in w for w in found.warnings)
    without = analyse(compare({"a": A, "b": B}, [low]))
    assert found.pairs[0].final.difference.value < without.pairs[0].final.difference.value


def test_failed_run_is_the_highest_where_lower_is_better() -> None:
    crashed = run("a", 2, 0.1, status="failed", error="boom")
    found = analyse(compare({"a": A, "b": B}, [crashed], higher_is_better=False))
    assert found.worst == 0.84
    assert found.ranking == ("b", "a")


@pytest.mark.parametrize("score", [[0.0, 0.2, math.nan], [], [0.1, 0.2, math.inf]])
def test_finished_run_without_a_score_is_failed(score: list[float]) -> None:
    bad = run("a", 0, 0.9, spent=GRID[: len(score)], score=np.array(score), seconds_at=None)
    found = analyse(compare({"a": A, "b": B}, [bad]))
    assert (found.of("a").done, found.of("a").failed) == (4, 1)
    assert found.of("a").error


def test_evaluations_without_a_number_are_left_out_of_a_curve() -> None:
    score = np.array([0.0, 0.2, math.nan, 0.6, 0.8])
    found = analyse(compare({"a": A, "b": B}, [run("a", 0, 0.8, score=score)]))
    assert found.of("a").done == 5
    assert found.of("a").auc == analyse(compare({"a": A, "b": B})).of("a").auc
    assert any("1 evaluation of a seed 0 gave no number" in w for w in found.warnings)
    many = analyse(compare({"a": A, "b": B}, [run("a", s, 0.8, score=score) for s in range(5)])).warnings
    assert [w for w in many if "no number" in w] == ["5 evaluations of a seeds 0, 1, 2, 3, 4 gave no number, left out."]


def test_unfinished_and_missing_runs_are_left_out() -> None:
    stopped = run("a", 1, 0.1, status="unfinished")
    found = analyse(compare({"a": A[:4], "b": B}, [stopped]))
    assert (found.of("a").done, found.of("a").unfinished) == (3, 2)
    assert found.pairs[0].seeds == (0, 2, 3)
    assert any("2 runs of a unfinished (seeds 1, 4)" in w for w in found.warnings)


def test_contestant_that_crashes_on_every_seed_is_listed_and_compared_with_nothing() -> None:
    crashed = [run("c", s, 0.0, status="failed", error="ValueError: bad", spent=np.empty(0), score=np.empty(0)) for s in range(5)]
    found = analyse(compare({"a": A, "b": B, "c": ()}, crashed))
    c = found.of("c")
    assert (c.final, c.curve, c.target) == (None, None, None)
    assert c.error == "ValueError: bad"
    assert [(p.a, p.b) for p in found.pairs] == [("a", "b")]
    assert found.ranking == ("a", "b")
    assert any("No run of c was finished (5 failed: ValueError: bad)" in w for w in found.warnings)
    none = analyse(compare({"c": ()}, crashed))
    assert (none.ranking, none.pairs, none.target) == ((), (), None)
    assert any("no finished run" in w for w in analyse(compare({"a": A, "c": ()}, crashed, baseline="c")).warnings)


def test_one_seed_and_one_contestant() -> None:
    one = analyse(compare({"a": A[:1], "b": B[:1]}))
    assert one.comparisons == 0
    assert one.pairs[0].final.decision == "undecided"
    assert one.pairs[0].final.difference.low is None
    assert one.pairs[0].final.seeds_needed is None
    assert any(w.startswith("One seed") for w in one.warnings)
    alone = analyse(compare({"a": A}))
    assert alone.pairs == ()
    assert any(w.startswith("One contestant") for w in alone.warnings)
    assert analyse(compare({})).contestants == ()


def test_contestants_without_a_common_seed_make_no_pair() -> None:
    runs = [run("a", 0, 0.5), run("a", 1, 0.6), run("b", 2, 0.5), run("b", 3, 0.6)]
    assert analyse(compare({"a": (), "b": ()}, runs, seeds=(0, 1, 2, 3))).pairs == ()


def test_all_equal_scores() -> None:
    found = analyse(compare({"a": [0.5] * 5, "b": [0.5] * 5}))
    a = found.of("a").final
    assert a is not None
    assert a.iqm.constant
    assert a.iqm.low == a.iqm.high == 0.5
    assert found.pairs[0].final.decision == "undecided"
    assert found.pairs[0].final.improvement.value == 0.5
    assert found.pairs[0].final.seeds_needed is None
    flat = analyse(compare({"a": [0.0] * 5, "b": [0.0] * 5}))
    assert (flat.gained, flat.target) == (0.0, None)


def test_sample_and_wall_clock_efficiency() -> None:
    found = analyse(compare({"a": [1.0] * 3, "b": [0.95, 0.95, 0.5]}))
    assert found.target == pytest.approx(0.9)
    a, b = found.of("a").target, found.of("b").target
    assert a is not None
    assert b is not None
    assert (a.share, a.decisions, a.seconds) == pytest.approx((1.0, 900, 9))
    assert (b.share, b.decisions) == pytest.approx((2 / 3, 900 / 0.95))
    crashed = [run("b", 1, 0.95, status="failed")]
    failed = analyse(compare({"a": [1.0] * 3, "b": [0.95, 0.95, 0.5]}, crashed)).of("b").target
    assert failed is not None
    assert (failed.share, failed.decisions, failed.seconds) == (1 / 3, None, None)
    few = analyse(compare({"a": [1.0] * 4, "b": [0.95, 0.95, 0.5, 0.5]})).of("b").target
    assert few is not None  # exactly half of the runs are half of the runs
    assert (few.share, few.spent, few.seconds) == pytest.approx((0.5, 900 / 0.95, 9 / 0.95))
    none = analyse(compare({"a": [1.0] * 4, "b": [0.95, 0.5, 0.5, 0.5]})).of("b").target
    assert none is not None
    assert (none.share, none.spent, none.seconds) == (0.25, None, None)
    pair = analyse(compare({"a": [1.0] * 2, "b": [0.95, 0.92]})).of("b").target
    assert pair is not None  # of an even number the earlier half
    assert (pair.share, pair.spent) == pytest.approx((1.0, 900 / 0.95))


def test_budget_in_another_unit_takes_decisions_from_the_run() -> None:
    made = compare({"a": A, "b": B}, unit="updates")
    found = analyse(made).of("a").target
    assert found is not None
    assert found.spent is not None
    assert found.decisions is None
    told = tuple(dataclasses.replace(r, decisions_at=8 * r.spent) for r in made.runs)
    found = analyse(dataclasses.replace(made, runs=told)).of("a").target
    assert found is not None
    assert found.spent is not None
    assert found.decisions == pytest.approx(8 * found.spent)


def test_runs_with_different_evaluations_compare_over_the_same_budget() -> None:
    fine, late = np.linspace(0, BUDGET, 41), np.linspace(200, BUDGET, 5)
    even = analyse(compare({"a": A, "b": A}, [run("b", s, f, grid=fine) for s, f in enumerate(A)]))
    assert even.pairs[0].auc.difference.value == pytest.approx(0, abs=1e-12)
    assert any("Numbers of evaluations differ: a 5, b 41" in w for w in even.warnings)
    cut = analyse(compare({"a": A, "b": A}, [run("b", s, f, grid=late) for s, f in enumerate(A)]))
    assert cut.start == 200
    assert cut.initial is None
    assert cut.pairs[0].auc.difference.value == pytest.approx(0, abs=1e-12)
    assert any("begin at 200 decisions: b has no earlier evaluation" in w for w in cut.warnings)


def test_curves_on_many_different_grids_are_sampled_at_common_points() -> None:
    rng = np.random.default_rng(0)
    runs = [run("a", s, f, grid=np.sort(np.append(rng.uniform(0, BUDGET, 30), [0.0, BUDGET]))) for s, f in enumerate(A)]
    curve = analyse(compare({"a": A, "b": B}, runs)).of("a").curve
    assert curve is not None
    assert len(curve.spent) == 51
    np.testing.assert_allclose(curve.iqm, iqm(np.array(A)) * np.array(curve.spent) / BUDGET)


def test_warnings_about_what_differs() -> None:
    def made(**fields: Any) -> list[str]:
        return list(analyse(compare({"a": A, "b": B}, [run("b", 1, 0.75, **fields)], notes=("a note",))).warnings)

    assert made() == ["a note"]
    versions = [
        run(n, s, 0.5, versions={"torch": "2.13" if (n, s) != ("b", 3) else "2.12", "gpu": None}) for n in "ab" for s in range(5)
    ]
    mixed = analyse(compare({"a": A, "b": B}, versions)).warnings
    assert mixed == ("Runs differ in torch: 2.13 (a seed 0, a seed 1 and 7 more); 2.12 (b seed 3).",)
    weights = [run(n, s, 0.5 + s, weights="x" if (n, s) != ("b", 3) else "y") for n in "ab" for s in range(4)]
    assert analyse(compare({"a": A, "b": B}, weights)).warnings == ("a and b began from different weights on seed 3.",)
    over = made(grid=np.linspace(0, 1.2 * BUDGET, 5))
    assert over == ["b spent up to 20% more than the budget of 1,000 decisions.", "a note"]
    assert made(grid=np.linspace(0, 1.04 * BUDGET, 5)) == ["a note"]


def test_json_is_strict_and_the_same_every_time() -> None:
    crashed = run("b", 2, math.nan, status="failed", error="boom")
    for made in (compare({"a": A, "b": B}, [crashed]), compare({"a": A[:1], "b": B[:1]}), compare({})):
        one, two = (json.dumps(to_json(analyse(made)), allow_nan=False, sort_keys=True) for _ in range(2))
        assert one == two
    assert to_json({"x": math.nan, 1: (math.inf, 2.0)}) == {"x": None, "1": [None, 2.0]}


def test_equal_contestants_are_rarely_decided_and_different_ones_usually() -> None:
    rng, wrong, right, times = np.random.default_rng(3), 0, 0, 80
    for _ in range(times):
        shared = rng.normal(0, 0.05, 6)  # what runs on one seed have in common
        noise = rng.normal(0, 0.02, (3, 6))
        same = analyse(compare({f"m{i}": 0.5 + shared + noise[i] for i in range(3)}))
        wrong += any(p.final.decision != "undecided" for p in same.pairs)
        apart = analyse(compare({"m0": 0.5 + shared + noise[0], "m1": 0.56 + shared + noise[1]}))
        right += apart.pairs[0].final.decision == "worse"
    assert wrong / times <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)
    # effect 0.06 / (0.02 √2) = 2.1 with 6 pairs: power 0.98
    assert right / times >= 0.9


def test_more_seeds_are_named_where_a_real_difference_is_not_seen_yet() -> None:
    found = analyse(compare({"a": (0.5, 0.62, 0.55, 0.58, 0.49), "b": (0.48, 0.52, 0.56, 0.50, 0.51)})).pairs[0].final
    assert found.decision == "undecided"
    gaps = np.array([0.02, 0.10, -0.01, 0.08, -0.02])
    # the least n of plain power with noncentral t
    effect, n = gaps.mean() / gaps.std(ddof=1), 2
    while scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, n - 1), n - 1, effect * math.sqrt(n)) < 0.8:
        n += 1
    assert found.seeds_needed == n
    assert 6 <= n <= 60
