"""The words: what the first sentence says in each case, and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polopt.evidence.compare.analysis import analyse
from polopt.evidence.compare.findings import Analysis
from polopt.evidence.compare.results import Comparison, Contestant, RunResult
from polopt.evidence.compare.statistics import Estimate
from polopt.evidence.compare.verdict import amount, bracketed, figure, table, verdict

GRID = np.linspace(0, 200_000, 5)


def found(
    finals: dict[str, Sequence[float]], *, failed: Sequence[tuple[str, int]] = (), initial: float = 0.0, **fields: Any
) -> Analysis:
    """A comparison of straight lines, analysed."""
    runs = tuple(
        RunResult(
            contestant=name, seed=s, status="failed" if (name, s) in failed else "done", folder=Path(), spent=GRID,
            score=initial + (final - initial) * GRID / GRID[-1], decisions=2e5, seconds=60.0, peak_rss=812_000_000,
            seconds_at=GRID / 1000 * (1 + i), error="RuntimeError: boom" if (name, s) in failed else "",
        )
        for i, (name, row) in enumerate(finals.items())
        for s, final in enumerate(row)
    )  # fmt: skip
    base: dict[str, Any] = {
        "task": "text:spell_backward", "budget": 200_000, "unit": "decisions", "metric": "eval_score", "higher_is_better": True,
        "seeds": tuple(range(max((len(r) for r in finals.values()), default=0))),
        "contestants": tuple(Contestant(n) for n in finals), "runs": runs,
    }  # fmt: skip
    return analyse(Comparison(**(base | fields)))


BEST, MIDDLE, LAST = (0.80, 0.82, 0.78, 0.81, 0.84), (0.70, 0.75, 0.69, 0.74, 0.71), (0.40, 0.43, 0.37, 0.42, 0.44)
NOISY = (0.69, 0.85, 0.70, 0.78, 0.75)


def test_first_sentence_of_a_decided_pair() -> None:
    for order in (("dapo", "grpo"), ("grpo", "dapo")):
        finals = {"dapo": BEST, "grpo": MIDDLE}
        said = verdict(found({n: finals[n] for n in order}))
        assert said[0] == (
            "dapo is better than grpo on text:spell_backward at 200k decisions: "
            "+0.092 [0.061, 0.123] in the final score (5 paired seeds)."
        )


def test_lower_is_better() -> None:
    said = verdict(found({"dapo": BEST, "grpo": MIDDLE}, higher_is_better=False, metric="kl", initial=2.0))
    assert said[0] == (
        "grpo is better than dapo on text:spell_backward at 200k decisions: "
        "-0.092 [-0.123, -0.061] in the final kl (lower is better) (5 paired seeds)."
    )
    assert any(s.startswith("grpo reached") for s in said)


def test_three_contestants_are_one_sentence_and_a_ranking() -> None:
    said = verdict(found({"gspo": LAST, "dapo": BEST, "grpo": MIDDLE}))
    assert said[0].startswith("dapo is better than grpo and gspo on text:spell_backward at 200k decisions: +0.09")
    assert "over grpo (5 paired seeds, corrected for 3 comparisons)." in said[0]
    assert said[1].startswith("grpo is better than gspo: +0.3")
    ranking = next(s for s in said if s.startswith("By final score"))
    assert ranking.index("dapo") < ranking.index("grpo") < ranking.index("gspo")


def test_undecided_says_how_many_more_seeds_would_tell() -> None:
    analysis = found({"grpo": NOISY, "gspo": MIDDLE})
    needed = analysis.pairs[0].final.seeds_needed
    assert needed is not None
    assert 5 < needed < 200
    assert verdict(analysis)[0].startswith(
        f"Undecided with these seeds; about {needed - 5} more would tell "
        "(grpo against gspo on text:spell_backward at 200k decisions: +0.0"
    )


def test_differences_that_no_number_of_seeds_would_tell_are_called_small() -> None:
    for middle in (0.001, 0.1):
        analysis = found({"a": 0.5 + np.array([0.1, -0.1, 0.2, -0.2, middle]), "b": [0.5] * 5})
        said, needed = verdict(analysis), analysis.pairs[0].final.seeds_needed
        assert needed is not None
        assert (needed == 10_001) if middle < 0.01 else (205 < needed < 1000)
        assert said[0].startswith(
            "Undecided with these seeds; it would take more than 200 more: small beside their spread (a against b"
        )


def test_narrow_interval_around_zero_is_no_difference() -> None:
    close = np.array([0.003, -0.002, 0.001, -0.004, 0.003])
    said = verdict(found({"a": 0.8 + close, "b": [0.8] * 5}))
    assert said[0] == (
        "No difference larger than 0.0041 either way between a and b on text:spell_backward at 200k decisions (5 paired seeds)."
    )
    wide = verdict(found({"a": 0.8 + close, "b": [0.8] * 5}, initial=0.79))  # nothing was gained that this is small beside
    assert wide[0].startswith("Undecided")


def test_equal_scores_one_seed_one_contestant_no_run() -> None:
    assert verdict(found({"a": [0.5] * 5, "b": [0.5] * 5}))[0].startswith("a and b ended equal on every seed")
    assert verdict(found({"a": [0.6] * 5, "b": [0.5] * 5}))[0].startswith("a is better than b")
    assert "on every seed" in verdict(found({"a": [0.6] * 5, "b": [0.5] * 5}))[0]
    one = verdict(found({"a": BEST[:1], "b": LAST[:1]}))
    assert one[0].startswith("Undecided with one seed (a against b")
    assert one[-1] == "One seed: no interval can be given and nothing can be decided."
    assert verdict(found({"a": [0.5] * 2, "b": [0.6] * 2}))[0].startswith("Undecided with two seeds")
    alone = verdict(found({"a": BEST}))
    assert alone[0].startswith("a stands alone on text:spell_backward at 200k decisions: 0.8")
    assert verdict(found({}))[0] == "No run was finished on text:spell_backward at 200k decisions: nothing can be said."


def test_caveats_come_last_and_can_be_left_out() -> None:
    analysis = found({"a": BEST, "b": MIDDLE}, failed=[("b", 3)], notes=("a folder was damaged",))
    said = verdict(analysis)
    assert said[-2:] == list(analysis.warnings)
    assert "1 of 5 runs of b failed (seed 3: RuntimeError: boom)" in said[-2]
    assert verdict(analysis, caveats=False) == said[:-2]


def test_baseline_is_what_everything_is_compared_with() -> None:
    said = verdict(found({"ppo": MIDDLE, "a": BEST, "b": LAST}, baseline="ppo"))
    assert said[0].startswith("a is better than ppo")
    assert said[1].startswith("ppo is better than b")
    assert "corrected for 2 comparisons" in said[0]
    lost = verdict(found({"ppo": BEST, "a": MIDDLE, "b": LAST}, baseline="ppo"))
    assert lost[0].startswith("ppo is better than a and b")


def test_a_baseline_without_runs_is_said() -> None:
    said = verdict(found({"ppo": LAST, "a": BEST, "b": MIDDLE}, failed=[("ppo", s) for s in range(5)], baseline="ppo"))
    assert said[0].startswith("Nothing was compared")
    assert any("The baseline ppo has no finished run" in s for s in said)


def test_efficiency_names_the_soonest_in_decisions_and_in_time() -> None:
    said = verdict(found({"a": MIDDLE, "b": BEST, "c": LAST}))
    line = next(s for s in said if "with the fewest decisions" in s)
    assert line == (
        "b reached 0.729 (90 % of the way to the best final score) with the fewest decisions, 180k; "
        "not reached by half of the runs of a and c (medians)."
    )
    tie = next(s for s in verdict(found({"a": BEST, "b": BEST})) if "fewest" in s)
    assert tie.startswith("a and b reached")
    assert any(s.startswith("In training time a was there first, after") for s in verdict(found({"a": BEST, "b": BEST})))


def test_half_of_the_runs_is_half() -> None:
    said = verdict(found({"a": [0.9] * 4, "b": [0.9, 0.9, 0.1, 0.1]}))
    line = next(s for s in said if "with the fewest decisions" in s)
    assert "not reached by half" not in line
    assert line.startswith("a and b reached")
    less = next(s for s in verdict(found({"a": [0.9] * 4, "b": [0.9, 0.1, 0.1, 0.1]})) if "fewest" in s)
    assert "not reached by half of the runs of b (medians)" in less


def test_areas_are_told_where_they_say_something_else() -> None:
    curves = {"fast": 0.8, "slow": 0.8}
    rng = np.random.default_rng(0)
    runs = []
    for name in curves:
        for s in range(6):
            end = 0.8 + rng.normal(0, 0.05)
            early = np.array([0, 0.6, 0.7, 0.75]) if name == "fast" else np.array([0, 0.1, 0.2, 0.3])
            runs.append(RunResult(name, s, "done", Path(), GRID, np.append(early + rng.normal(0, 0.02), end)))
    comparison = Comparison(
        "t", 200_000, "decisions", "eval_score", True, tuple(range(6)), tuple(Contestant(n) for n in curves), tuple(runs)
    )
    said = verdict(analyse(comparison))
    assert not said[0].startswith("fast is better")
    assert any(s.startswith("Over the whole budget fast is better than slow: +0.3") for s in said)


def test_many_contestants_stay_readable() -> None:
    rng = np.random.default_rng(0)
    analysis = found({f"m{i}": 0.5 + 0.01 * i + rng.normal(0, 0.02, 5) for i in range(12)})
    said = verdict(analysis)
    assert len(said) < 20
    assert all(len(s) < 600 for s in said)
    assert any("further pairs" in s for s in said)


@pytest.mark.parametrize(
    ("x", "text"), [(200_000, "200k"), (1_500_000, "1.5M"), (2e9, "2G"), (750, "750"), (0, "0"), (12.5, "12.5")]
)  # fmt: skip
def test_amounts(x: float, text: str) -> None:
    assert amount(x) == text


def test_figures_have_the_digits_that_their_interval_supports() -> None:
    assert figure(0.04149, 0.057, sign=True) == "+0.041"
    assert figure(1234.5678, 80) == "1235"
    assert figure(-0.0001, 1) == "0.0"
    assert figure(0.0) == "0"
    assert figure(0.12345) == "0.123"
    assert bracketed(Estimate(0.5, None, None)) == "0.500"
    assert bracketed(Estimate(-3.21, -4.44, -2.01), sign=True) == "-3.2 [-4.4, -2.0]"


def test_table_for_the_terminal() -> None:
    from rich.console import Console

    def text(analysis: Analysis) -> str:
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table(analysis))
        return console.export_text()

    out = text(found({"a[x]": MIDDLE, "b": BEST, "c": LAST}, failed=[("c", s) for s in range(5)] + [("a[x]", 1)]))
    rule = next(i for i, line in enumerate(out.splitlines()) if "──" in line)
    lines = [line for line in out.splitlines()[rule + 1 :] if line.strip()]
    assert [line.split()[0] for line in lines] == ["b", "a[x]", "c"]
    assert "0.81 [" in lines[0] or "0.810 [" in lines[0]
    assert "812 MB" in lines[0]
    assert "1/5" in lines[1]
    assert "RuntimeError: boom" in lines[2]
    assert "5/5" in lines[2]
    assert "than next)" in out
    base = text(found({"a": MIDDLE, "b": BEST}, baseline="a"))
    assert "than baseline)" in base
    assert " baseline " in base
    assert "t" in text(found({}))


def test_scores_that_are_not_numbers_leave_no_trace_in_words() -> None:
    said = verdict(found({"a": (0.5, math.nan, 0.6), "b": (0.4, 0.5, 0.3)}))
    assert "nan" not in " ".join(said)
    assert any("1 of 3 runs of a failed (seed 1: its last score is not a number)" in s for s in said)
