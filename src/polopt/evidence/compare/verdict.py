"""What a comparison says, in words and as a table for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polopt.evidence.compare.caveats import listed
from polopt.evidence.compare.findings import Analysis, Measure, Outcome, Pair, Standing
from polopt.evidence.compare.statistics import Estimate
from polopt.evidence.report.words import duration, size

if TYPE_CHECKING:
    from rich.table import Table

#: An undecided difference whose interval lies within this share of the gained range either way is called small.
SMALL = 0.1
#: Above this number of further seeds none is named.
MANY = 200
#: Sentences about single pairs, besides the first.
SENTENCES = 6


def verdict(analysis: Analysis, *, caveats: bool = True) -> list[str]:
    """Sentences: the answer first, then other pairs, areas, ranking, efficiency and, unless turned off, what limits it all."""
    said = [*_pairs(analysis), *_areas(analysis), *_ranking(analysis), *_efficiency(analysis)]
    return [*said, *analysis.warnings] if caveats else said


def amount(x: float) -> str:
    """`200k`, `1.5M`, `750`."""
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= step:
            return f"{x / step:.3g}{unit}"
    return f"{x:.3g}"


def figure(x: float, width: float | None = None, *, sign: bool = False) -> str:
    """A number with two significant digits of the width of its interval, three of its own without one."""
    scale = width if width else abs(x) / 10
    places = min(max(1 - math.floor(math.log10(scale)), 0), 12) if scale > 0 and math.isfinite(scale) else 0
    text = f"{x:+.{places}f}" if sign else f"{x:.{places}f}"
    return text if float(text) else f"{0:.{places}f}"


def bracketed(e: Estimate, *, sign: bool = False) -> str:
    """`+0.041 [0.012, 0.069]`, or the number alone where there is no interval or it has no width."""
    if e.low is None or e.high is None or e.constant:
        return figure(e.value, sign=sign)
    width = e.high - e.low
    return f"{figure(e.value, width, sign=sign)} [{figure(e.low, width)}, {figure(e.high, width)}]"


def _where(analysis: Analysis) -> str:
    return f"on {analysis.task} at {amount(analysis.budget)} {analysis.unit}"


def _score(analysis: Analysis) -> str:
    name = "score" if analysis.metric == "eval_score" else analysis.metric
    return name if analysis.higher_is_better else f"{name} (lower is better)"


def _weight(analysis: Analysis, pair: Pair) -> str:
    n = len(pair.seeds)
    corrected = f", corrected for {analysis.comparisons} comparisons" if analysis.comparisons > 1 else ""
    return f"({n} paired seed{'s' * (n > 1)}{corrected})"


def _names(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if len(items) <= 5 else listed(items)


def decided(analysis: Analysis, pair: Pair, *, where: bool = True) -> str:
    """`a is better than b ...` for a pair that A wins."""
    e = pair.final.corrected
    every = " on every seed" if e.constant else ""
    place = f" {_where(analysis)}" if where else ""
    what = f"{bracketed(e, sign=True)} in the final {_score(analysis)}{every}"
    return f"{pair.a} is better than {pair.b}{place}: {what} {_weight(analysis, pair)}."


def undecided(analysis: Analysis, pair: Pair, *, where: bool = True) -> str:
    """Why a pair is not decided, and how many more seeds would tell."""
    e, n = pair.final.corrected, len(pair.seeds)
    against, place = f"{pair.a} against {pair.b}", f" {_where(analysis)}" if where else ""
    if e.constant and e.value == 0:
        return f"{pair.a} and {pair.b} ended equal on every seed{place} ({n} paired seeds)."
    if n == 1:
        return f"Undecided with one seed ({against}{place}: {figure(e.value, sign=True)}); at least 5 are needed."
    if e.low is None or e.high is None:
        return f"Undecided with two seeds ({against}{place}: {figure(e.value, sign=True)}); at least 5 are needed."
    reach = max(abs(e.low), abs(e.high))
    if analysis.gained and reach <= SMALL * analysis.gained:
        step = 10.0 ** (math.floor(math.log10(reach)) - 1)  # two digits, rounded up
        most = figure(math.ceil(reach / step - 1e-9) * step, reach)
        return f"No difference larger than {most} either way between {pair.a} and {pair.b}{place} {_weight(analysis, pair)}."
    found = f"({against}{place}: {bracketed(e, sign=True)} in the final {_score(analysis)})"
    more = _more(pair.final, n)
    if more is None:
        return f"Undecided with these seeds {found}."
    if more > MANY:
        return f"Undecided with these seeds; it would take more than {MANY} more: small beside their spread {found}."
    return f"Undecided with these seeds; about {more} more would tell {found}."


def _more(outcome: Outcome, n: int) -> int | None:
    return None if outcome.seeds_needed is None else max(outcome.seeds_needed - n, 1)


def _facing_winner(analysis: Analysis) -> list[Pair]:
    """Pairs with the winner (or else the one that ranks higher) first, those of the best contestant at the head."""
    place = {name: i for i, name in enumerate(analysis.ranking)}
    turned = []
    for p in analysis.pairs:
        swap = p.final.decision == "worse" or (p.final.decision == "undecided" and place[p.b] < place[p.a])
        pair = analysis.pair(p.b, p.a) if swap else p
        turned.append(pair if pair is not None else p)
    return sorted(turned, key=lambda p: (place[p.a], place[p.b]))


def _pairs(analysis: Analysis) -> list[str]:
    standing = [s for s in analysis.contestants if s.final is not None]
    if not standing:
        return [f"No run was finished {_where(analysis)}: nothing can be said."]
    pairs = _facing_winner(analysis)
    if not pairs:
        return [_alone(analysis, standing)]
    first, rest = _lead(analysis, pairs)
    said = [first]
    for p in rest[:SENTENCES]:
        say = undecided if p.final.decision == "undecided" else decided
        said.append(say(analysis, p, where=False))
    if len(rest) > SENTENCES:
        left = rest[SENTENCES:]
        sure = sum(p.final.decision != "undecided" for p in left)
        said.append(f"Of {len(left)} further pair{'s' * (len(left) > 1)}, {sure} {'is' if sure == 1 else 'are'} decided.")
    return said


def _alone(analysis: Analysis, standing: list[Standing]) -> str:
    if len(standing) > 1:
        return f"Nothing was compared {_where(analysis)}: {_names([s.name for s in standing])} share no seed or lack the baseline."
    only, final = standing[0], standing[0].final
    assert final is not None
    n = len(final.seeds)
    score = f"{bracketed(final.iqm)} in the final {_score(analysis)} ({n} seed{'s' * (n > 1)})"
    return f"{only.name} stands alone {_where(analysis)}: {score}."


def _lead(analysis: Analysis, pairs: list[Pair]) -> tuple[str, list[Pair]]:
    """The first sentence and the pairs that it leaves to tell.

    It is about the best contestant: against all that it beats, in numbers against the nearest of these.
    """
    top = pairs[0].a if analysis.baseline is not None else analysis.ranking[0]
    own = [p for p in pairs if p.a == top]
    beaten = [p for p in own if p.final.decision == "better"]
    if not own:
        own = pairs[:1]
    if not beaten:
        decisive = [p for p in pairs if p.final.decision == "better"]
        first = own[0]
        return undecided(analysis, first), [*decisive, *(p for p in pairs if p is not first and p not in decisive)]
    nearest = beaten[0]
    if len(beaten) == 1:
        return decided(analysis, nearest), [p for p in pairs if p is not nearest]
    e = nearest.final.corrected
    what = f"{bracketed(e, sign=True)} in the final {_score(analysis)} over {nearest.b}{' on every seed' if e.constant else ''}"
    names = _names([p.b for p in beaten])
    sentence = f"{top} is better than {names} {_where(analysis)}: {what} {_weight(analysis, nearest)}."
    return sentence, [p for p in pairs if p not in beaten]


def _areas(analysis: Analysis) -> list[str]:
    """Pairs that the whole curve decides where the final score does not, or the other way round."""
    said = []
    for p in analysis.pairs:
        if p.auc.decision == "undecided" or p.auc.decision == p.final.decision:
            continue
        pair = p if p.auc.decision == "better" else analysis.pair(p.b, p.a)
        if pair is not None:
            difference = bracketed(pair.auc.corrected, sign=True)
            said.append(f"Over the whole budget {pair.a} is better than {pair.b}: {difference} in the mean {_score(analysis)}.")
    return said if len(said) <= SENTENCES else [f"Over the whole budget {len(said)} pairs are decided whose final scores are not."]


def _ranking(analysis: Analysis) -> list[str]:
    if len(analysis.ranking) < 3:
        return []
    places = []
    for name in analysis.ranking[:10]:
        final = analysis.of(name).final
        assert final is not None
        places.append(f"{name} {bracketed(final.iqm)}")
    more = f" and {len(analysis.ranking) - 10} more" if len(analysis.ranking) > 10 else ""
    return [f"By final {_score(analysis)}: {', '.join(places)}{more}."]


def _efficiency(analysis: Analysis) -> list[str]:
    """Who reached the target with the least budget and in the least time of training."""
    reach = {s.name: s.target for s in analysis.contestants if s.target is not None}
    if analysis.target is None or len(reach) < 2:
        return []
    goal = f"{figure(analysis.target)} (90 % of the way to the best final score)"
    spent = sorted((t.spent, n) for n, t in reach.items() if t.spent is not None)
    if not spent:
        return [f"In no contestant do half of the runs reach {goal}."]
    first = [n for x, n in spent if amount(x) == amount(spent[0][0])]
    said = [f"{_names(first)} reached {goal} with the fewest {analysis.unit}, {amount(spent[0][0])}"]
    if spent[len(first) :]:
        said.append(", ".join(f"{n} {amount(x)}" for x, n in spent[len(first) : len(first) + 5]))
    short = [n for n, t in reach.items() if t.spent is None]
    if short:
        said.append(f"not reached by half of the runs of {_names(short)}")
    lines = [f"{'; '.join(said)} (medians)."]
    seconds = sorted((t.seconds, n) for n, t in reach.items() if t.seconds is not None)
    if len(seconds) > 1 and analysis.unit != "seconds" and duration(seconds[0][0]) != duration(seconds[1][0]):
        others = ", ".join(f"{n} {duration(x)}" for x, n in seconds[1:6])
        lines.append(f"In training time {seconds[0][1]} was there first, after {duration(seconds[0][0])}; {others}.")
    return lines


def table(analysis: Analysis) -> Table:
    """Contestants, best first, with their numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    unit = analysis.unit
    over = "baseline" if analysis.baseline is not None else "next"
    title = f"{analysis.task}, {amount(analysis.budget)} {unit}; to target: {unit} until 90 % of the way"
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    heads = ["contestant", f"final\n{_score(analysis)}", "mean over\nbudget", f"P(better\nthan {over})", "to\ntarget"]
    for i, head in enumerate([*heads, "decisions\nper second", "memory", "failed"]):
        out.add_column(head, justify="right" if i else "left", no_wrap=i == 0)
    for place, name in enumerate(analysis.ranking):
        row = analysis.of(name)
        out.add_row(Text(name), *_cells(row), *_improvement(analysis, place), *_costs(row))
    for row in analysis.contestants:
        if row.final is None:
            what = row.error or ("no finished run" if row.failed or row.unfinished else "no run")
            out.add_row(Text(row.name), Text(what), "", "", *_costs(row))
    return out


def _cells(row: Standing) -> tuple[str, str]:
    def cell(m: Measure | None) -> str:
        return "" if m is None else bracketed(m.iqm).replace("[", r"\[")

    return cell(row.final), cell(row.auc)


def _improvement(analysis: Analysis, place: int) -> tuple[str]:
    """Over the baseline, or else over the next in the ranking."""
    name = analysis.ranking[place]
    if name == analysis.baseline:
        return ("baseline",)
    after = analysis.ranking[place + 1] if place + 1 < len(analysis.ranking) else None
    other = analysis.baseline or after
    pair = None if other is None else analysis.pair(name, other)
    if pair is None:
        return ("",)
    e = pair.final.improvement
    return (f"{e.value:.2f} \\[{e.low:.2f}, {e.high:.2f}]" if e.low is not None and e.high is not None else f"{e.value:.2f}",)


def _costs(row: Standing) -> tuple[str, str, str, str]:
    target = "" if row.target is None else "not reached" if row.target.spent is None else amount(row.target.spent)
    speed = "" if row.decisions_per_second is None else amount(row.decisions_per_second)
    memory = "" if row.peak_rss_max is None else size(row.peak_rss_max)
    total = row.done + row.failed
    return target, speed, memory, f"{row.failed}/{total}" if row.failed else "0"


__all__ = ["amount", "bracketed", "figure", "table", "verdict"]
