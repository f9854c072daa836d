"""The comparison page without a browser: its numbers, its pictures, and that nothing from outside gets out of its place."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_comparisons import NAMES, NASTY, VERSIONS, comparison

from polopt.evidence.compare.analysis import analyse
from polopt.evidence.compare.findings import to_json
from polopt.evidence.compare.numbers import numbers
from polopt.evidence.compare.page import make_page
from polopt.evidence.compare.plots import DASHES, MARKERS, PRINT, Curve, _plot, frame, look, swatch, thin
from polopt.evidence.compare.results import Comparison, Contestant, RunResult
from polopt.evidence.compare.tables import decimals, fixed
from polopt.evidence.compare.verdict import verdict

VOID = {"meta", "br", "hr", "img", "input", "link", "use"}


class Page(HTMLParser):
    """Parses strictly: every element is closed in order. Collects references, ids, texts and the embedded data."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.raw = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.names: list[str] = []
        self.words: list[str] = []
        self.data = ""
        self.kind = ""
        self.feed(self.raw)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        assert not any(k.startswith("on") for k in given), attrs  # no handlers in attributes
        self.refers += [given[k] or "" for k in ("href", "src", "xlink:href") if k in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        self.names += [given["data-name"] or ""] if tag == "button" and "data-name" in given else []
        self.kind = given.get("id") or tag if tag == "script" else ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open and self.kind == "data":
            self.data += data
        elif "script" not in self.open and "style" not in self.open:
            self.words.append(data)


def made(given: Comparison, out: Path) -> tuple[Page, dict[str, Any]]:
    path = make_page(given, analyse(given), out)
    assert path == out / "index.html"

    def no(x: str) -> None:
        raise AssertionError(f"not strict JSON: {x}")

    return Page(path), json.loads((out / "comparison.json").read_text(), parse_constant=no)


def test_the_numbers_are_those_of_the_analysis(tmp_path: Path) -> None:
    given = comparison(4, failing={(1, 2): "RuntimeError: boom", (3, 4): ""}, folder=tmp_path)
    page, kept = made(given, tmp_path)
    analysis = analyse(given)
    assert kept["analysis"] == json.loads(json.dumps(to_json(analysis)))
    assert kept["verdict"] == verdict(analysis, caveats=False)
    assert kept["command"] == given.command
    assert [(r["contestant"], r["seed"]) for r in kept["runs"]] == [(r.contestant, r.seed) for r in given.runs]
    for r, run in zip(kept["runs"], given.runs, strict=True):
        assert r["curve"]["score"] == run.score.tolist()
        assert r["versions"] == VERSIONS
        assert r["folder"] == f"runs/{run.folder.parent.name}/{run.folder.name}"
    shown = numbers(given, analysis, tmp_path)
    for c, s in zip(shown["contestants"], analysis.contestants, strict=True):
        assert s.curve is not None
        assert s.final is not None
        assert c["final"]["value"] == s.final.iqm.value
        assert c["curves"]["budget"]["mid"] == list(s.curve.iqm)
    embedded = json.loads(page.data)
    curves = analysis.contestants[0].curve
    assert curves is not None
    assert embedded["curves"]["budget"][0]["mid"] == pytest.approx(curves.iqm, rel=1e-5)
    for sentence in [*kept["verdict"], *analysis.warnings]:
        assert " ".join(sentence.split()) in page.text
    assert page.text.index(kept["verdict"][0]) < page.text.index("Caveats") < page.text.index("Learning curves")
    assert "RuntimeError: boom" in page.text
    assert given.command in page.text
    assert "Some Processor 9000" in page.text


def test_the_axis_of_seconds_is_that_of_scores_at_equal_time(tmp_path: Path) -> None:
    """Two runs, one twice as fast: at each time the mean of what both have reached; a run keeps its last score."""
    x = np.array([0.0, 50.0, 100.0])
    runs = tuple(
        RunResult("a", s, "done", tmp_path / str(s), x, x * 1.0, seconds_at=x / speed) for s, speed in ((0, 1.0), (1, 2.0))
    )
    given = Comparison("t", 100, "decisions", "eval_score", True, (0, 1), (Contestant("a"),), runs)
    curve = numbers(given, analyse(given), tmp_path)["contestants"][0]["curves"]["seconds"]
    t = np.array(curve["x"])
    assert (t[0], t[-1]) == (0, 100)
    assert curve["mid"] == pytest.approx((np.minimum(t, 100) + np.minimum(2 * t, 100)) / 2)


def test_a_failed_run_counts_as_the_worst_score_at_all_times(tmp_path: Path) -> None:
    given = comparison(1, 2, failing={(0, 1): "boom"}, folder=tmp_path)
    analysis = analyse(given)
    shown = numbers(given, analysis, tmp_path)["contestants"][0]
    final = analysis.contestants[0].final
    assert final is not None
    assert shown["curves"]["seconds"]["mid"][-1] == pytest.approx(final.iqm.value)
    assert [s["failed"] for s in shown["seeds"]] == [False, True]


def test_nothing_leaves_its_place(tmp_path: Path) -> None:
    names = (NASTY, "a" * 200, r"$\frac{", "{x} %s", "ünï 漢字 \u2028")
    given = comparison(
        names, 3, folder=tmp_path, notes=(NASTY,), command=NASTY, task=NASTY, metric=NASTY, settings={NASTY: NASTY},
        failing={(0, 0): NASTY}, nan=((3, 1),),
    )  # fmt: skip
    page, kept = made(given, tmp_path)
    assert [c["name"] for c in kept["analysis"]["contestants"]] == list(names)
    assert page.names == list(names)
    assert page.raw.count("<script") == 2 == page.raw.count("</script")
    assert "alert(" not in re.sub(r"&quot;|alert\(&quot;", "", page.data)
    assert "<b>" not in page.data
    for name in ("curves.png", "curves.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
    text = "".join(ET.parse(tmp_path / "curves.svg").getroot().itertext())
    assert r"$\frac{" in text
    assert "aaaaaaaaaa…" in text


def test_refers_to_nothing_outside(tmp_path: Path) -> None:
    page, _ = made(comparison(3, folder=tmp_path), tmp_path)
    for target in page.refers:
        assert re.fullmatch(r"data:,|#[\w-]+|runs/\d+/seed-\d+/|comparison\.json|curves\.(png|svg)", target), target
    assert not re.search(r"https?://(?!www\.w3\.org/)", page.raw)
    assert "@import" not in page.raw
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (comparison(1, 1), "One seed"),
        (comparison(2, 1), "grpo"),
        (comparison(2, 2, failing={(i, s): "ImportError: none" for i in range(2) for s in range(2)}), "No run has a score to draw"),
        (comparison(3, 3, failing={(1, s): "ImportError: none" for s in range(3)}), "3 failed"),
        (comparison(2, 3, nan=((0, 0), (0, 1), (0, 2))), "not a number"),
        (comparison(12, 3), "12 contestants"),
        (comparison(3, 4, baseline="dapo"), "compared with"),
        (comparison(2, 3, timed=False), "grpo"),
        (comparison(2, 3, unit="seconds"), "seconds"),
        (comparison(2, 3, points=1), "grpo"),
        (comparison(2, 3, higher_is_better=False), "lower is better"),
        (comparison(2, 4, seeds_wanted=6), "not begun"),
        (comparison((), 0), "nothing"),
    ],
)  # fmt: skip
def test_odd_comparisons_have_a_page(given: Comparison, said: str, tmp_path: Path) -> None:
    page, kept = made(given, tmp_path)
    assert said in page.text
    assert kept["format"] == 1
    assert (tmp_path / "curves.png").is_file()
    timed = given.unit != "seconds" and all(r.seconds_at is not None for r in given.runs)
    if "axes" in json.loads(page.data) and json.loads(page.data)["axes"]:
        assert ("seconds" in json.loads(page.data)["axes"]) == timed
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", page.text)


def test_pictures_are_pictures(tmp_path: Path) -> None:
    made(comparison(4, folder=tmp_path), tmp_path)
    png = (tmp_path / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 1500
    assert height >= 800
    root = ET.parse(tmp_path / "curves.svg").getroot()
    assert root.tag.endswith("svg")
    text = "".join(root.itertext())
    assert all(word in text for word in (*NAMES[:4], "decisions", "eval_score"))


def test_written_twice_it_is_the_same(tmp_path: Path) -> None:
    given = comparison(3, folder=tmp_path)
    names = ("index.html", "comparison.json", "curves.svg")
    made(given, tmp_path)
    first = [(tmp_path / n).read_bytes() for n in names]
    made(given, tmp_path)
    assert [(tmp_path / n).read_bytes() for n in names] == first
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "curves.png"])


def test_different_versions_are_listed_apart(tmp_path: Path) -> None:
    given = comparison(2, 2, folder=tmp_path)
    odd = RunResult(**(vars(given.runs[3]) | {"versions": VERSIONS | {"torch": "2.99"}}))
    given = Comparison(**(vars(given) | {"runs": (*given.runs[:3], odd)}))
    page, _ = made(given, tmp_path)
    assert "3 runs: grpo (seeds 0, 1); dapo (seeds 0)" in page.text
    assert "1 runs: dapo (seeds 1)" in page.text
    assert "2.99" in page.text


def test_size_of_a_large_page(tmp_path: Path) -> None:
    given = comparison(12, 25, points=400, folder=tmp_path)
    page, _ = made(given, tmp_path)
    assert len(page.raw.encode()) < 2_000_000
    embedded = json.loads(page.data)
    assert all(len(c["x"]) <= 200 for c in embedded["curves"]["budget"])
    assert "300 runs, all done" in page.text


# --------------------------------------------------------------------------------------------------------- small pieces
def test_twelve_contestants_look_different() -> None:
    looks = [look(i) for i in range(12)]
    assert len({(c, str(d)) for c, d, _ in looks}) == 12
    assert len({m for _, _, m in looks}) == 12 == len(MARKERS)
    assert len(PRINT) == 6
    assert len(DASHES) == 4
    for i in range(12):
        ET.fromstring(swatch(i))


def test_seventy_contestants_look_different() -> None:
    looks = [look(i) for i in range(72)]
    assert len({(c, m) for c, _, m in looks}) == 72  # strips show no dashes
    assert len({(c, str(d)) for c, d, _ in looks[:24]}) == 24


@pytest.mark.parametrize("points", [64, 51])
def test_markers_lie_at_a_contestants_own_evaluations(points: int) -> None:
    """Also where curves are sampled at points that no run has: the line goes through the evaluation all the same."""
    own = np.array([0.0, 30.0, 60.0, 90.0])
    x = np.union1d(own, np.linspace(0, 90, 40)) if points == 64 else np.linspace(0, 90, points)
    axes = Figure().add_subplot()
    _plot(axes, [Curve("a", 0, x, 2 * x, x, 3 * x, own), Curve("b", 1, x, x, x, x)], PRINT, "k", "k", named=False)
    line, other = axes.get_lines()
    where = line.get_markevery()
    assert line.get_xdata()[where].tolist() == own.tolist()
    assert line.get_ydata()[where] == pytest.approx(2 * own)
    assert set(x) <= set(line.get_xdata())
    assert 9 <= len(other.get_markevery()) <= 11


def test_the_page_marks_each_contestants_own_evaluations(tmp_path: Path) -> None:
    fine, coarse = comparison(1, 2, points=21), comparison(2, 2, points=6)
    mixed = dataclasses.replace(coarse, runs=tuple(r for r in fine.runs) + tuple(r for r in coarse.runs if r.contestant == "dapo"))
    found = numbers(mixed, analyse(mixed), tmp_path)
    marks = {c["name"]: len(c["curves"]["budget"]["marks"]) for c in found["contestants"]}
    assert marks == {"grpo": 21, "dapo": 6}
    assert {len(c["curves"]["budget"]["x"]) for c in found["contestants"]} == {21}


def test_thinned_curves_keep_their_ends() -> None:
    x = np.arange(1000.0)
    curve = thin(Curve("a", 0, x, x, x - 1, x + 1), 50)
    assert len(curve.x) == 50
    assert (curve.x[0], curve.x[-1]) == (0, 999)
    assert (curve.high - curve.low == 2).all()


def test_axes_do_not_follow_wild_intervals() -> None:
    assert frame([0.0, 10.0], [-1000.0, 12.0]) == (-5.0, 12.0)
    assert frame([3.0], [1.0, 4.0]) == (1.0, 4.0)
    assert frame([5.0, 5.1], [3.0, 7.0, 2.0, 8.2]) == (2.0, 8.2)  # all are wide: that is what there is to see
    assert frame([], [5.0]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "half", "digits"),
    [
        ([412.0, 395.0], None, 0),
        ([0.81, 0.79], None, 3),
        ([498.2, 499.1], None, 2),
        ([498.2, 499.1], 10.0, 0),  # an interval of ±10 makes hundredths void
        ([498.2, 499.1], 0.3, 2),
        ([0.0231], 0.04, 3),
        ([0.0123], None, 4),
        ([0.0], None, 0),
        ([], None, 0),
        ([12000.0, 1.0], None, 0),
    ],
)
def test_decimals_of_a_column(values: list[float], half: float | None, digits: int) -> None:
    known = [{"value": v, "low": half and v - half, "high": half and v + half} for v in values]
    assert decimals([None, *known]) == digits


def test_fixed_numbers() -> None:
    assert fixed(-0.01, 1) == "0.0"
    assert fixed(1234.5, 0, sign=True) == "+1,234"
    assert fixed(-3.21, 1) == "−3.2"
    assert fixed(3e9, 0) == "3.00e+09"
