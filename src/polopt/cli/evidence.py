"""`polopt evidence`: methods' miniature experiments, run, judged, stored and checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError, PoloptError

if TYPE_CHECKING:
    from polopt.evidence.proof.gather import Checked, Evidence, Gathered


def arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `evidence`."""
    sub.add_argument("methods", nargs="*", metavar="METHOD", help="a name, or file.py:NAME")
    sub.add_argument("--all", action="store_true", help="every method that declares a miniature experiment")
    sub.add_argument("--check", action="store_true", help="repeat stored experiments elsewhere; status 1 if a result does not hold")
    sub.add_argument("--again", action="store_true", help="run anew even where a stored result is of the present experiment")
    sub.add_argument("--jobs", type=int, metavar="N", help="runs side by side [one per core]")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where results are stored [evidence]")
    sub.add_argument("--quiet", action="store_true", help="no table while it runs")


def evidence(args: argparse.Namespace) -> int:
    """`polopt evidence METHOD ...` or `--all`, with `--check` or `--again`."""
    from polopt import api
    from polopt.evidence.proof.gather import RUNS, Evidence, temporary

    if bool(args.methods) == args.all:
        raise CallError("polopt evidence takes METHOD or --all; 'polopt evidence --help' shows how")
    if args.check and args.again:
        raise CallError("--check repeats stored experiments and stores nothing; --again stores new ones: give one of them")
    if args.jobs is not None and args.jobs < 1:
        raise CallError(f"--jobs {args.jobs}: expected at least 1")
    names = list(args.methods) or [name for name, m in api.methods().items() if m.miniature is not None]
    if not args.check:
        return _gather(names, Evidence(args.out, runs=RUNS, jobs=args.jobs, again=args.again, quiet=args.quiet))
    with temporary() as place:
        return _check(names, Evidence(args.out, runs=place, jobs=args.jobs, quiet=args.quiet))


def _gather(names: Sequence[str], work: Evidence) -> int:
    found: list[Gathered] = _each(names, work.gather, _line)
    if len(names) > 1:
        _table([g.result for g in found])
    return 0 if len(found) == len(names) else 1


def _check(names: Sequence[str], work: Evidence) -> int:
    found: list[Checked] = _each(names, work.check, str)
    return 0 if len(found) == len(names) and all(c.holds for c in found) else 1


def _each(names: Sequence[str], act: Callable[[str], Any], line: Callable[[Any], str]) -> list[Any]:
    """What `act` gives for each method; with several, one that fails is named and left out."""
    from polopt.evidence.proof.gather import Unfinished

    done = []
    for name in names:
        try:
            done.append(act(name))
        except PoloptError as error:
            if len(names) == 1 or isinstance(error, Unfinished):
                raise
            print(f"polopt: {name}: {error}", file=sys.stderr)
            continue
        print(line(done[-1]), flush=True)
    return done


def _line(found: Gathered) -> str:
    where = f"stored in {found.path}" if found.made else f"{found.path} is of the present experiment; --again runs it anew"
    return f"{found} ({where})"


def _table(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("method", "baseline", "task", "result", "difference", "core seconds"):
        table.add_column(name, no_wrap=True)
    for r in results:
        gap = r["difference"]
        spread = "" if gap["low"] is None else f" [{gap['low']:.3g}, {gap['high']:.3g}]"
        difference = "-" if gap["mean"] is None else f"{gap['mean']:+.3g}{spread}"
        table.add_row(r["method"], r["baseline"], r["task"], r["result"], Text(difference), f"{r['core_seconds']:.0f}")
    console = Console()
    Console(width=max(console.width, 136)).print(table)
