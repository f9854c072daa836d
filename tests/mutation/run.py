"""`make mutate`: seed faults into `src/polopt/parts` and report the share that the suite catches; exit 1 below 90 %.

Every survivor is looked at: `survivors.yaml` holds the verdicts, by the fault's id. The share that counts is the raw one, of all
faults, also of those that change nothing that anyone could see.
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import suite
import yaml
from mutants import KINDS, Fault, faults
from scipy.stats import binomtest

BAR = 0.90
VERDICTS = Path(__file__).with_name("survivors.yaml")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="faults judged at once")
    parser.add_argument("--folder", type=Path, default=suite.SOURCE / "polopt" / "parts", help="where faults are seeded")
    parser.add_argument("--only", nargs="*", default=[], help="parts of file names, kinds or ids; default: everything")
    parser.add_argument("--sample", type=int, metavar="N", help="N faults drawn at random, always the same ones")
    parser.add_argument(
        "--tests", nargs="*", metavar="FILE", help="ask only these tests; a fault that others catch counts as not caught"
    )
    parser.add_argument("--json", type=Path, help="where the result is written")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    return parser.parse_args(argv)


def chosen(folder: Path, only: Sequence[str]) -> list[Fault]:
    """The faults of a folder (or of one file) that match."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    found = [f for p in files for f in faults(str(p.resolve().relative_to(suite.ROOT)), p.read_text())]
    return [f for f in found if not only or any(o in f.file or o in (f.kind, f.id) for o in only)]


def difference(fault: Fault) -> str:
    """The changed lines, `-` before and `+` after."""
    lines = difflib.ndiff(fault.before.splitlines(), fault.after.splitlines())
    return "\n".join(f"    {x[0]} {x[2:].strip()}" for x in lines if x[0] in "-+")


def table(title: str, rows: list[tuple[str, bool]]) -> list[str]:
    """Caught of all, by a word."""
    total, caught = Counter(k for k, _ in rows), Counter(k for k, ok in rows if ok)
    width = max(map(len, [title, *total]))
    lines = [f"{title:<{width}}  caught  of   share"]
    for k in sorted(total, key=lambda k: (caught[k] / total[k], k)):
        lines.append(f"{k:<{width}}  {caught[k]:>6}  {total[k]:>4} {caught[k] / total[k]:>6.1%}")
    return lines


def verdicts() -> dict[str, dict[str, str]]:
    return yaml.safe_load(VERDICTS.read_text()) or {} if VERDICTS.exists() else {}


def versions() -> dict[str, str]:
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=suite.ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "python": sys.version.split()[0]}


def report(results: list[tuple[Fault, str | None]], seconds: float, failed: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The result as data and as lines of text."""
    seen = verdicts()
    survivors = [f for f, by in results if by is None]
    told = [f for f in survivors if f.id in seen]
    harmless = [f for f in told if seen[f.id]["verdict"].startswith("equivalent")]
    caught = len(results) - len(survivors)
    share = caught / len(results)
    how = Counter(
        "timeout" if by == suite.TIMEOUT else "import" if by and by.startswith("import") else "test" for _, by in results if by
    )
    lines = [*table("kind", [(f.kind, by is not None) for f, by in results]), ""]
    lines += [*table("file", [(f.file, by is not None) for f, by in results]), ""]
    for f in survivors:
        verdict = seen.get(f.id, {}).get("verdict", "NOT LOOKED AT")
        lines += [
            f"survivor {f.id}  {f.file}:{f.line}  {f.kind} ({KINDS[f.kind]}) in {f.where or 'module'}",
            difference(f),
            f"    {verdict}",
        ]
    lines += [f"left out, fails without any fault: {t}" for t in failed]
    lines.append(
        f"{caught} of {len(results)} faults caught: {share:.1%} ({how['test']} by a test, {how['timeout']} ran on without end, "
        f"{how['import']} at import); {len(survivors)} survive, {len(told)} of them looked at, {len(harmless)} equivalent "
        f"({caught / max(len(results) - len(harmless), 1):.1%} without those); {seconds / 60:.1f} min"
    )
    data = {
        "share": share, "caught": caught, "faults": len(results), "by": dict(how), "bar": BAR,
        "share_without_equivalent": caught / max(len(results) - len(harmless), 1), "seconds": round(seconds, 1), **versions(),
        "kinds": counted((f.kind, by) for f, by in results), "files": counted((f.file, by) for f, by in results),
        "left_out": failed,
        "survivors": [
            {"id": f.id, "file": f.file, "line": f.line, "kind": f.kind, "where": f.where, "change": difference(f).strip(),
             "verdict": seen.get(f.id, {}).get("verdict")}
            for f in survivors
        ],
    }  # fmt: skip
    return data, lines


def counted(rows: Any) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for key, by in rows:
        entry = out.setdefault(key, {"caught": 0, "faults": 0})
        entry["faults"] += 1
        entry["caught"] += by is not None
    return dict(sorted(out.items()))


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    found = chosen(given.folder.resolve(), given.only)
    total = len(found)
    if given.sample is not None and given.sample < total:
        kept = set(random.Random(0).sample(range(total), given.sample))
        found = [f for i, f in enumerate(found) if i in kept]
    if given.tests:
        suite.TESTS = tuple(given.tests)
    if given.list or not found:
        for f in found:
            print(f"{f.id}  {f.file}:{f.line}  {f.kind}\n{difference(f)}")
        print(f"{len(found)} faults")
        return 0 if found else 2
    began = time.monotonic()
    suite.warm_up()
    folder = given.folder.resolve()
    coverage = suite.cover(folder, given.jobs)
    print(f"{len(coverage.seconds)} tests, {len(found)} faults, {time.monotonic() - began:.0f} s so far", flush=True)
    results: list[tuple[Fault, str | None]] = []
    for fault, by, seconds in suite.judged(found, coverage, given.jobs):
        results.append((fault, by))
        if sys.stderr.isatty():
            print(f"\r{len(results)}/{len(found)}", end="", file=sys.stderr, flush=True)
        if by is None:
            print(f"survives: {fault.id} {fault.file}:{fault.line} {fault.kind} ({seconds:.1f} s)", flush=True)
    order = {f.id: i for i, f in enumerate(found)}
    results.sort(key=lambda r: order[r[0].id])
    data, lines = report(results, time.monotonic() - began, coverage.failed)
    data["of"] = total
    if len(found) < total:
        low, high = (100 * x for x in binomtest(data["caught"], len(found)).proportion_ci(method="wilson"))
        lines.append(f"a sample of {len(found)} of {total} faults: the share of all is {low:.1f} to {high:.1f}% (95%)")
    print("\n".join(["", *lines]))
    whole = len(found) == total and not given.only
    if whole:
        unknown = sorted(set(verdicts()) - {f.id for f in found})
        print(f"verdicts on faults that no longer exist: {', '.join(unknown)}" if unknown else "", end="\n" * bool(unknown))
    if given.json and not given.only and not given.tests:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if data["share"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
