"""Gathering evidence: run a method's miniature through the comparison, judge it, store what came out, and check what is stored."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polopt.claim import Miniature
from polopt.errors import CallError, PoloptError
from polopt.evidence.compare.folders import code_of, read_record, set_aside
from polopt.evidence.compare.results import RunResult
from polopt.evidence.compare.run import compare
from polopt.evidence.markup import strict, write
from polopt.evidence.proof import miniature, stored
from polopt.evidence.proof.miniature import Arm, arms, baseline_name, declared, digest, miniature_of, resolved, values
from polopt.method import Method
from polopt.registry import get_method

#: Folders and modules of the library that no number of a run depends on.
APART = ("evidence", "cli", "integrations", "assets", "methods", "api.py", "catalogue.py", "claim.py", "__init__.py", "__main__.py")
RUNS = Path("runs") / "evidence"


class Unfinished(PoloptError):
    """The experiment was interrupted; the runs are saved and the same call goes on with them."""

    def __init__(self, name: str, folder: Path, signal: int | None) -> None:
        super().__init__(f"the evidence of {name} is not complete; the same command goes on with the runs in {folder}")
        self.exit_code = 128 + signal if signal else 1


@dataclass
class Gathered:
    """A method's evidence: the stored file's content, where it is, and whether it was made just now."""

    method: str
    result: dict[str, Any] = field(repr=False)
    path: Path
    made: bool

    def __str__(self) -> str:
        return f"{self.method}: {self.result['result']}: {self.result['sentence']}"


@dataclass
class Checked:
    """A stored result beside one from new runs.

    moved: by how much numbers of single runs differ at most; stale: what has changed in the experiment since.
    """

    method: str
    before: dict[str, Any] = field(repr=False)
    after: dict[str, Any] = field(repr=False)
    moved: float = 0.0
    stale: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the word is the same."""
        return bool(self.before["result"] == self.after["result"])

    @property
    def identical(self) -> bool:
        """Whether every number is, bit for bit."""
        return self.moved == 0.0

    def __str__(self) -> str:
        old, new = self.before["result"], self.after["result"]
        word = f"holds ({new})" if self.holds else f"does not hold: stored as {old}, now {new}"
        same = "bit-identical" if self.identical else f"numbers of runs moved by up to {self.moved:.3g}"
        was = f"; the stored result was stale: {_some(self.stale)}" if self.stale else ""
        return f"{self.method}: {word}; {same}{was}; {self.after['sentence']}"


class Evidence:
    """Gathers evidence of methods; runs that several of them share are done once.

    out: where results are stored (default: `evidence` here, or for the library's methods that of the repository); runs: where runs
    are kept; jobs: runs side by side (default: one per core); again: anew, even where a stored result and finished runs exist.
    """

    def __init__(
        self, out: Path | str | None = None, *, runs: Path | str = RUNS, jobs: int | None = None, again: bool = False,
        quiet: bool = True,
    ) -> None:  # fmt: skip
        self.out = None if out is None else Path(out).expanduser()
        self.runs, self.jobs, self.again, self.quiet = Path(runs), jobs, again, quiet
        self._renewed: set[Path] = set()

    # ---------------------------------------------------------------- results
    def path(self, method: Method) -> Path:
        """Where a method's result is stored."""
        usual = stored.home() if stored.registered(method) else Path.cwd() / stored.FOLDER
        return (self.out or usual) / f"{method.name}.json"

    def stored(self, method: Method) -> dict[str, Any] | None:
        """A method's stored result. Raises `CallError` if it is damaged."""
        path = self.path(method)
        return stored.read(path) if path.is_file() else None

    def due(self, method: Method) -> str:
        """Why a method's experiment is to be run; empty if its stored result is of the present experiment."""
        if self.again:  # whatever is stored, also where it is damaged
            return "asked for anew"
        found = self.stored(method)
        if found is None:
            return "nothing is stored"
        changed = miniature.stale(method, found)
        return f"stale: {_some(changed)}" if changed else ""

    def gather(self, which: str | Method) -> Gathered:
        """Run what is missing of a method's experiment and store its result; a result of the present experiment is left as it is.

        Raises `CallError` for a method without a miniature, `Unfinished` if interrupted.
        """
        method, given = _method(which)
        miniature_of(method)
        if not self.due(method):
            known = self.stored(method)
            assert known is not None
            return Gathered(method.name, known, self.path(method), False)
        result = self.carry_out(method, given)
        path = self.path(method)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
        return Gathered(method.name, result, path, True)

    def check(self, which: str | Method) -> Checked:
        """Repeat a stored experiment in a new folder. Raises `CallError` where nothing is stored."""
        method, given = _method(which)
        miniature_of(method)
        before = self.stored(method)
        if before is None and self.out is None and stored.registered(method):
            before = stored.evidence(method.name)  # what the library ships, wherever one works
        if before is None:
            raise CallError(f"{self.path(method)} does not exist; 'polopt evidence {given or method.name}' makes it")
        after = self.carry_out(method, given)
        return Checked(method.name, before, after, _moved(before, after), miniature.stale(method, before))

    # ---------------------------------------------------------------- runs
    def carry_out(self, method: Method, given: str | None) -> dict[str, Any]:
        """The experiment's result, from runs that are done or done now. Raises `PoloptError` where no seed gave two numbers."""
        m, sides = miniature_of(method), arms(method, given)
        found = {arm.name: values(resolved(arm, m)) for arm in sides}
        code = {arm.name: code_of(resolved(arm, m)) for arm in sides}  # of parts that are not the library's
        labels = {arm.name: _label(arm, m) for arm in sides}
        folder = self.folder(m)
        if self.again:
            self.renew(folder, labels.values())
        compared = compare(
            {labels[a.name]: (a.method, a.settings) for a in sides}, m.task, budget=m.budget, seeds=m.runs, out=folder,
            jobs=self.jobs, metric=m.metric, points=m.points, page=False, quiet=self.quiet, source=f"miniature of {method.name}",
        )  # fmt: skip
        runs = {a.name: list(compared.comparison.of(labels[a.name]).values()) for a in sides}
        both = [r for some in runs.values() for r in some]
        if compared.signal is not None or any(r.status == "unfinished" for r in both):
            raise Unfinished(method.name, folder, compared.signal)
        weighed = miniature.weigh(method, runs[method.name], runs[sides[-1].name])
        if not weighed["pairs"]:
            why = next((r.error for r in both if r.error), "no run ended")
            raise PoloptError(f"the experiment of {method.name} gave no pair of numbers, so nothing is stored: {why} ({folder})")
        for name, entry in weighed["arms"].items():
            entry |= {"settings": found.get(name, {}), **({"code": code[name]} if code.get(name) else {})}
        return self.whole(method, given, weighed, both)

    def folder(self, m: Miniature) -> Path:
        """The folder of runs on the same task with the same budget and evaluations; methods share it."""
        task = m.task.rpartition(":")[2].rpartition("/")[2].lower()
        return self.runs / f"{task}-{digest([m.task, m.budget, m.points])[:8]}"

    def renew(self, folder: Path, labels: Iterable[str]) -> None:
        """Put runs aside that were not made by this object."""
        for label in labels:
            place = folder / "runs" / label
            if place not in self._renewed and place.exists():
                set_aside(place, "asked for anew", "before")
            self._renewed.add(place)

    def whole(self, method: Method, given: str | None, weighed: Mapping[str, Any], runs: Sequence[RunResult]) -> dict[str, Any]:
        """The stored file's content."""
        m = miniature_of(method)
        versions = next((dict(r.versions) for r in runs if r.versions), {})
        commits = [c for r in sorted(runs, key=_began) if (c := r.versions.get("commit"))]
        hardware = {k: versions.pop(k, None) for k in ("cpu", "cpu_count", "gpu", "platform")}
        hardware["cpu"] = hardware["cpu"] or next((v for r in runs if (v := _versions(r).get("cpu"))), None)
        versions.pop("commit", None)
        shown = {"result": weighed["result"], "sentence": miniature.sentence(method, weighed)}
        found: dict[str, Any] = {
            "format": 1, "method": method.name, "card": method.card, "title": method.title, "paper": method.paper,
            "claim": method.claim, "tested": m.claim, **shown, "task": m.task, "budget": m.budget, "points": m.points,
            "metric": m.metric, "reduce": m.reduce, "expect": m.expect, "margin": m.margin, "baseline": baseline_name(method),
            "settings": dict(m.settings), "own": dict(m.own), "other": dict(m.other), "seeds": list(m.runs),
            "difference": weighed["difference"], "pairs": weighed["pairs"], "arms": weighed["arms"],
            "core_seconds": round(sum(_seconds(r) for r in runs), 1),
            "commit": commits[-1] if commits else None, "commits": sorted(set(commits)),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions, "hardware": hardware,
            "command": f"polopt evidence {given or method.name} --again", "miniature": declared(m),
            "fingerprint": miniature.fingerprint(method),
        }  # fmt: skip
        clean: dict[str, Any] = strict(found)
        return clean


# -------------------------------------------------------------------- helpers
def _method(which: str | Method) -> tuple[Method, str | None]:
    return (get_method(which), which) if isinstance(which, str) else (which, None)


def _label(arm: Arm, m: Miniature) -> str:
    """A name for the runs of an arm that changes with everything their numbers depend on: settings and code."""
    run = resolved(arm, m)
    return f"{arm.name}-{digest([values(run), code_of(run), library_code()])[:10]}"


@functools.cache
def library_code() -> str:
    """A hash of the library's code that runs depend on; comments and docstrings do not count."""
    root = Path(__file__).parents[2]
    files = sorted(f for f in root.rglob("*.py") if f.relative_to(root).parts[0] not in APART)
    return digest([[str(f.relative_to(root)), digest(stored.skeleton(f.read_text(encoding="utf-8")))] for f in files])


def _seconds(run: RunResult) -> float:
    """Processor time of a run's process; what the clock showed, for a run whose processor time is not known."""
    return float(read_record(run.folder).get("cpu_seconds") or run.wall_seconds or 0.0)


def _began(run: RunResult) -> str:
    return str(read_record(run.folder).get("began"))


def _versions(run: RunResult) -> Mapping[str, Any]:
    found = read_record(run.folder).get("versions")
    return found if isinstance(found, Mapping) else {}


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The largest difference between numbers of the same run; infinite where one of them is missing."""
    most = 0.0
    for name, arm in after["arms"].items():
        new = arm["values"]
        known = before.get("arms", {}).get(name, {}).get("values", {})
        if new.keys() != known.keys():
            return float("inf")
        most = max([most, *(abs(new[s] - known[s]) for s in new)])
    return most


def _some(lines: Sequence[str]) -> str:
    return f"{lines[0]}{f' (and {len(lines) - 1} more)' if len(lines) > 1 else ''}"


def temporary() -> tempfile.TemporaryDirectory[str]:
    """A place for the runs of a check."""
    return tempfile.TemporaryDirectory(prefix="polopt-evidence-")


__all__ = ["RUNS", "Checked", "Evidence", "Gathered", "Unfinished", "temporary"]
