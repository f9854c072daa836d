"""`polopt compare`: contestants on one task at equal budget."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import TYPE_CHECKING

from polopt.cli.words import COMPARE
from polopt.errors import CallError

if TYPE_CHECKING:
    from polopt.evidence.compare.run import Compared

EPILOG = """\
METHOD is a name, file.py:NAME, one with settings of its own (ppo,epochs=4,lr=1e-3), or one under a name of its own
(mine=ppo,epochs=4). Every other option --path.to.setting VALUE holds for all contestants. Running the same command again
continues what was interrupted; with more seeds or methods and the same --out it adds them.

examples
  polopt compare ppo a2c trpo --task gym:CartPole-v1 --seeds 5 --budget 50k-decisions
  polopt compare grpo dapo gspo --task text:spell_backward --seeds 5 --budget 200k-decisions --tune 8
  polopt compare ppo --task gym:CartPole-v1 --seeds 5 --budget 50k-decisions \\
      --external "sb3=python sb3_ppo.py --seed {seed} --steps {decisions} --out {out}\""""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `compare` that are no settings."""
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.usage = "polopt compare METHOD [METHOD ...] --task TASK --budget 200k-decisions [--seeds 5] [--path.to.setting VALUE ...]"
    sub.epilog = EPILOG
    sub.add_argument("methods", nargs="*", metavar="METHOD", help="a contestant")
    sub.add_argument("--task", metavar="TASK", help="gym:CartPole-v1, text:spell_backward, data:questions.jsonl, file.py:NAME")
    sub.add_argument("--budget", metavar="B", help="of every run: 200k-decisions, 500-updates, 20k-rounds, 2M-tokens or 90-seconds")
    sub.add_argument("--seeds", default="5", metavar="N", help="a number of seeds, or the seeds: 0,3,7 [5]")
    sub.add_argument("--out", metavar="DIR", help="the comparison's folder [runs/compare-<methods>-<task>]")
    sub.add_argument("--jobs", type=int, metavar="N", help="runs side by side [one per core; 1 on an accelerator]")
    sub.add_argument("--baseline", metavar="NAME", help="compare the others with this one only [all pairs]")
    sub.add_argument("--metric", default="eval_score", metavar="KEY", help="what is compared, a key of metrics.jsonl [eval_score]")
    sub.add_argument("--lower-is-better", action="store_true", help="for a metric such as a loss")
    sub.add_argument("--points", type=int, default=10, metavar="N", help="evaluations, spread evenly over the budget [10]")
    sub.add_argument("--episodes", type=int, metavar="N", help="episodes or prompts per evaluation [the task's, or 20]")
    sub.add_argument("--external", action="append", default=[], metavar="NAME=COMMAND", help="a program as a contestant")
    sub.add_argument("--tune", type=int, default=0, metavar="N", help="settings to try for each method, on other seeds [0]")
    sub.add_argument("--tune-seeds", type=int, default=2, metavar="N", help="seeds for each setting that is tried [2]")
    sub.add_argument(
        "--search", action="append", default=[], metavar="PATH=LOW..HIGH[:log]",
        help="what is tried, also PATH=A|B|C [the rates of all updates, from a tenth to ten times]",
    )  # fmt: skip
    sub.add_argument("--timeout", type=float, metavar="S", help="give up a run without new metrics for so many seconds [never]")
    sub.add_argument("--dry-run", action="store_true", help="show what would run; run nothing")
    sub.add_argument("--quiet", action="store_true", help="no table while it runs")


def compare(args: argparse.Namespace, settings: dict[str, str]) -> int:
    """`polopt compare METHOD ... --task TASK --budget BUDGET`."""
    for path in settings:
        if near := difflib.get_close_matches(f"--{path}", COMPARE, n=1, cutoff=0.85):
            raise CallError(f"unknown option --{path}, did you mean '{near[0]}'?")
    for name in ("task", "budget"):
        if getattr(args, name) is None:
            raise CallError(f"polopt compare needs --{name}; 'polopt compare --help' shows how")
    from polopt.evidence.compare import run

    asking = {
        "budget": args.budget, "seeds": args.seeds, "baseline": args.baseline, "metric": args.metric,
        "lower_is_better": args.lower_is_better, "points": args.points, "episodes": args.episodes, "external": args.external,
        "tune": args.tune, "tune_seeds": args.tune_seeds, "search": args.search, "overrides": settings, "source": "command line",
        "out": args.out, "jobs": args.jobs, "timeout": args.timeout,
    }  # fmt: skip
    if args.dry_run:
        print(run.describe(args.methods, args.task, **asking))
        return 0
    return _say(run.compare(args.methods, args.task, quiet=args.quiet, **asking))


def _say(found: Compared) -> int:
    """Print the verdict, the table, what failed and where the page is; the exit status."""
    from rich.console import Console

    from polopt.evidence.compare.verdict import table, verdict

    comparison, console = found.comparison, Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file has room for the table
    if found.signal is not None:
        print(f"polopt: interrupted, saved in {found.folder}; continue with: {comparison.command}", file=sys.stderr)
        return 128 + found.signal
    console.print(table(found.analysis))
    for line in [*verdict(found.analysis), *(c.tuning for c in comparison.contestants if c.tuning)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    failed = [r for r in comparison.runs if r.status != "done"]
    for run in failed[:10]:
        print(f"{run.status}: {run.contestant}, seed {run.seed}: {run.error or 'not finished'} ({run.folder})")
    if len(failed) > 10:
        print(f"... and {len(failed) - 10} more")
    print(f"page: {found.page}" if found.page else f"results: {found.folder}")
    return 1 if failed else 0
