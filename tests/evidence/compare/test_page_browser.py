"""The pages in a real browser without a display: they render, answer, fit a phone, and ask the network for nothing."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic_comparisons import NASTY, comparison

from polopt.evidence.compare.analysis import analyse
from polopt.evidence.compare.page import make_page
from polopt.evidence.report.page import make_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1240, "height": 900}
Open = Callable[..., Any]
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as p:
        # no sandbox: tests may run as root in a container
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made once: a usual one with a failed and an unfinished run, a small one, a large one, and one with hostile names."""
    given = {
        "few": lambda at: comparison(4, failing={(1, 2): "RuntimeError: boom", (3, 4): ""}, folder=at),
        "one": lambda at: comparison(1, 1, folder=at),
        "none": lambda at: comparison(2, 2, failing={(i, s): "ImportError: x" for i in range(2) for s in range(2)}, folder=at),
        "large": lambda at: comparison(12, 25, points=21, failing={(5, s): "MemoryError" for s in range(25)}, folder=at),
        "nasty": lambda at: comparison((NASTY, "b" * 200, "$x^{2"), 3, notes=(NASTY,), task=NASTY, command=NASTY, folder=at),
    }
    out = {}
    for name, make in given.items():
        at = tmp_path_factory.mktemp(name)
        asked = make(at)
        out[name] = make_page(asked, analyse(asked), at)
    return out


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens a file; at the end of the test there must have been no message, no error and no request to anything but files."""
    contexts: list[Any] = []
    said: list[str] = []
    asked: list[str] = []

    def guard(route: Any) -> None:
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
        else:
            route.abort()

    def opened(path: Path, *, viewport: dict[str, int] = DESKTOP, **settings: Any) -> Any:
        context = browser.new_context(viewport=viewport, **settings)
        contexts.append(context)
        context.route("**/*", guard)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("dialog", lambda d: said.append(f"dialog: {d.message}"))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)  # the page alone


def names_of(page: Any, table: str) -> list[str]:
    """First column of the rows that are shown."""
    script = "rows => rows.filter(r => r.offsetParent).map(r => r.cells[0].querySelector('.who > span').firstChild.textContent)"
    found: list[str] = page.eval_on_selector_all(f"#table-{table} tbody tr", script)
    return found


def fits(page: Any) -> bool:
    """Whether nothing makes the page itself scroll sideways."""
    found: bool = page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth")
    return found


# ----------------------------------------------------------------------------------------------------------- comparison
def test_the_verdict_is_seen_first(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    first = page.locator(".verdict p").first
    assert first.is_visible()
    assert first.bounding_box()["y"] < 200
    tops = [page.locator(f"h2:text-is('{h}')").bounding_box()["y"] for h in ("Caveats", "Learning curves", "Results", "Runs")]
    assert tops == sorted(tops)
    assert first.bounding_box()["y"] < tops[0]
    assert page.locator(".plots svg:visible").count() == 1
    assert page.locator(".plots svg:visible .series path").count() > 4


def test_columns_sort(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    head = page.locator("#table-results th", has_text="Final score")

    def scores() -> list[float]:
        found: list[str] = page.eval_on_selector_all("#table-results tbody td:nth-child(2)", "c => c.map(x => x.dataset.v)")
        return [float(v) for v in found]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"  # the best first
    assert scores() == sorted(scores(), reverse=True)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert scores() == sorted(scores())
    name = page.locator("#table-results th", has_text="Contestant")
    name.locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert names_of(page, "results") == sorted(names_of(page, "results"))


def test_unknown_numbers_sort_last_both_ways(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["large"])
    for _ in range(2):
        page.locator("#table-results th button", has_text="Final score").click()
        assert names_of(page, "results")[-1] == "rloo"


def test_rows_filter(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["large"])
    assert len(names_of(page, "results")) == 12
    page.get_by_label("Contestant", exact=True).first.fill("REINF")
    assert names_of(page, "results") == ["reinforce", "reinforce-baseline"]
    assert page.locator("[data-for=table-results] output").text_content() == "2 of 12"
    page.get_by_label("Contestant", exact=True).first.fill("")
    assert len(names_of(page, "results")) == 12
    assert not page.locator("#table-runs").is_visible()  # many runs are folded
    page.locator("summary", has_text="300 runs, 25 of them failed or unfinished").click()
    assert len(names_of(page, "runs")) == 300
    page.locator("[data-for=table-runs] select[data-key=status]").select_option("failed")
    assert names_of(page, "runs") == ["rloo"] * 25
    page.locator("[data-for=table-runs] select[data-key=name]").select_option("ppo")
    assert names_of(page, "runs") == []
    page.locator("[data-for=table-runs] select[data-key=status]").select_option("done")
    assert names_of(page, "runs") == ["ppo"] * 25


def test_hover_shows_numbers(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    at, value = page.locator(".at"), page.locator(".keys .value").first
    rest = value.text_content()
    assert at.text_content().startswith("At the end")
    page.locator(".plots").scroll_into_view_if_needed()
    box = page.locator(".plots svg:visible").bounding_box()
    left, width = 50 / 1100 * box["width"], (1100 - 66) / 1100 * box["width"]
    page.mouse.move(box["x"] + left + 0.4 * width, box["y"] + box["height"] / 2)
    assert at.text_content() == "At 80,000 decisions:"
    curve = page.evaluate("data.curves.budget[0]")
    i = curve["x"].index(80000)
    assert value.text_content() == f"{curve['mid'][i]:.3g}"
    low, high = (f"{curve[k][i]:.3g}" for k in ("low", "high"))
    assert page.locator(".keys .range").first.text_content() == f"[{low}, {high}]"
    assert page.locator(".plots svg:visible .cross circle").count() == 4
    cross = page.locator(".plots svg:visible .cross line").bounding_box()
    assert cross["x"] == pytest.approx(box["x"] + left + 0.4 * width, abs=2)
    page.mouse.move(5, 5)
    assert value.text_content() == rest
    assert page.locator(".plots svg:visible .cross").count() == 0


def test_the_crosshair_lies_on_the_curves(visit: Open, pages: dict[str, Path]) -> None:
    """Dots are computed by the script, curves were drawn by matplotlib: they must meet."""
    page = visit(pages["one"])
    page.locator(".plots").focus()
    page.keyboard.press("Home")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    gap = page.evaluate("""() => {
      const svg = [...document.querySelectorAll('.plots svg')].find(s => s.getBoundingClientRect().width);
      const dot = svg.querySelector('.cross circle'), path = svg.querySelector('.series path');
      const [x, y] = [Number(dot.getAttribute('cx')), Number(dot.getAttribute('cy'))];
      let best = Infinity;
      for (let s = 0; s <= path.getTotalLength(); s += 0.25) {
        const p = path.getPointAtLength(s);
        best = Math.min(best, Math.hypot(p.x - x, p.y - y));
      }
      return best;
    }""")
    assert gap < 0.5


def test_keys_move_the_crosshair(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    plots = page.get_by_role("slider", name="Crosshair on the learning curves")
    plots.focus()
    page.keyboard.press("Home")
    assert page.locator(".at").text_content() == "At 0 decisions:"
    page.keyboard.press("ArrowRight")
    assert page.locator(".at").text_content() == "At 10,000 decisions:"
    assert re.match(r"10,000 decisions: grpo [\d.]+, dapo", plots.get_attribute("aria-valuetext"))
    page.keyboard.press("End")
    assert plots.get_attribute("aria-valuenow") == plots.get_attribute("aria-valuemax") == "20"
    page.keyboard.press("Escape")
    assert page.locator(".at").text_content().startswith("At the end")


def test_the_legend_switches_curves(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    key = page.get_by_role("button", name="dapo").first
    shown = page.locator(".plots svg:visible .series.s1:visible")
    assert shown.count() >= 2  # line and band
    key.click()
    page.mouse.move(5, 5)
    assert key.get_attribute("aria-pressed") == "false"
    assert shown.count() == 0
    assert page.locator(".plots svg:visible .series.s0:visible").count() >= 2
    key.focus()
    page.keyboard.press("Space")
    assert key.get_attribute("aria-pressed") == "true"
    assert shown.count() >= 2


def test_the_axis_switches(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    page.get_by_role("button", name="training seconds").click()
    assert page.locator("[data-axis-of=seconds]").is_visible()
    assert not page.locator("[data-axis-of=budget]").is_visible()
    assert page.locator(".plots svg:visible").count() == 1
    page.locator(".plots").focus()
    page.keyboard.press("Home")
    assert page.locator(".at").text_content() == "At 0 training seconds:"
    page.get_by_role("button", name="decisions", exact=True).click()
    assert page.locator("[data-axis-of=budget]").is_visible()


@pytest.mark.parametrize("name", ["few", "one", "none", "large", "nasty"])
def test_fits_a_phone(name: str, visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages[name], viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert fits(page)
    for summary in page.locator("summary").all():
        if summary.is_visible() and not summary.evaluate("s => s.parentElement.open"):
            summary.click()
    assert fits(page)
    heights = "all => all.map(t => t.getBoundingClientRect()).filter(b => b.width).map(b => b.height)"
    small = page.eval_on_selector_all("svg[role=img] text", heights)
    assert all(h > 8 for h in small)  # labels can be read
    if name == "few":
        page.locator(".plots").scroll_into_view_if_needed()
        box = page.locator(".plots svg:visible").bounding_box()
        page.touchscreen.tap(box["x"] + box["width"] * 0.6, box["y"] + 60)
        assert re.match(r"At [\d,]+ decisions:", page.locator(".at").text_content())


def test_digits_and_bars_do_not_overlap(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    overlaps = """cells => cells.filter(c => {
      const [value, range, bar] = [...c.children].map(e => { const r = document.createRange(); r.selectNodeContents(e);
                                                             return (e.className === 'bar' ? e : r).getBoundingClientRect(); });
      return value.right > range.left || range.right > bar.left;
    }).length"""
    cells = page.locator(".est:visible").count()
    assert cells == 14
    assert page.eval_on_selector_all(".est", overlaps.replace("cells.filter", "cells.filter(c => c.offsetParent).filter")) == 0


def test_dark_is_dark(visit: Open, pages: dict[str, Path]) -> None:
    def light(colour: str) -> float:
        r, g, b = (int(v) for v in re.findall(r"\d+", colour)[:3])
        return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255

    script = "([q, k]) => getComputedStyle(document.querySelector(q))[k]"
    for scheme, dark in (("dark", True), ("light", False)):
        page = visit(pages["few"], color_scheme=scheme)
        for back in ("body", ".panel", ".scroll", ".tools input"):
            assert (light(page.evaluate(script, [back, "backgroundColor"])) < 0.2) == dark, back
        for ink in ("body", ".verdict", "td", ".finding .what", ".at", ".tools input"):
            assert (light(page.evaluate(script, [ink, "color"])) > 0.5) == dark, ink
        fill = page.evaluate(script, [".plots svg text", "fill"])
        assert (light(fill) > 0.5) == dark
        drawn = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
        assert (drawn.mean() < 60) == dark


def test_basics_of_accessibility(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"])
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title() == "grpo, dapo, gspo and dr-grpo on gym:CartPole-v1"
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, select, a, summary, [role]:not(svg)')]
      .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length)))
      .map(e => e.outerHTML)""")
    assert nameless == []
    named = "s => s.ariaHidden === 'true' || (s.getAttribute('role') === 'img' && s.getAttribute('aria-label'))"
    assert page.eval_on_selector_all("svg", f"all => all.every({named})")
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.locator("[id]").count()
    assert page.locator("h1").count() == 1
    assert page.locator("th:not([scope])").count() == 0


def test_hostile_names_stay_text(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["nasty"])
    assert page.locator("script").count() == 2
    assert page.locator("main b:not(.bar b)").count() == 0
    assert page.locator(".keys .name").first.text_content() == NASTY
    page.locator("[data-for=table-runs] select[data-key=name]").select_option(NASTY)
    assert names_of(page, "runs") == [NASTY] * 3


def test_readable_without_a_script(visit: Open, pages: dict[str, Path]) -> None:
    page = visit(pages["few"], java_script_enabled=False)
    assert page.locator(".verdict p").first.is_visible()
    assert page.locator(".plots svg").first.is_visible()
    assert page.locator(".keys .value").first.text_content() != "–"
    assert page.locator("#table-results tbody tr").count() == 4
    assert not page.locator(".tools").first.is_visible()
    assert not page.locator(".switch").is_visible()


def test_opens_at_once_with_300_runs(visit: Open, pages: dict[str, Path]) -> None:
    assert pages["large"].stat().st_size < 5_000_000
    seconds = []
    for _ in range(3):  # other work on the machine may disturb one of them
        start = time.perf_counter()
        page = visit(pages["large"])
        page.locator(".at").wait_for()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert loaded < 2000
    # every step of the crosshair answers within a frame or two
    page.locator(".plots").focus()
    took = page.evaluate("""() => {
      const start = performance.now();
      for (let i = 0; i < 50; i++) { at = i % data.axes.budget.grid.length; show(); }
      return (performance.now() - start) / 50;
    }""")
    assert took < 30


# ---------------------------------------------------------------------------------------------------- report of one run
def test_the_report_of_a_run(visit: Open, make_run: MakeRun) -> None:
    path = make_report(make_run(200))
    page = visit(path)
    assert page.locator(".verdict p").first.is_visible()
    assert page.locator(".panel svg:visible").count() >= 3
    assert fits(page)
    phone = visit(path, viewport=PHONE)
    assert fits(phone)
