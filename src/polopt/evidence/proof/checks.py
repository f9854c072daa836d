"""The checks that a certificate is made of; each says in a few words what it found, and why it failed or could not be made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from polopt.errors import Misfit, PoloptError
from polopt.evidence.proof import golden, invariance, small, stored, survival
from polopt.evidence.proof.verified import verify
from polopt.interfaces import Event
from polopt.loops.drive import drive
from polopt.method import Method
from polopt.overrides import resolve

#: ok, failed; none: there is nothing to check (the reason says why); unknown: it cannot be checked here
Result = Literal["ok", "failed", "none", "unknown"]


@dataclass(frozen=True)
class Check:
    """One check: its result, how it reads in the certificate's line, why it is not ok, and its numbers."""

    result: Result
    text: str
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """For the certificate."""
        return {"result": self.result, "text": self.text, "reason": self.reason, **self.details}

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Check:
        """From `json`."""
        rest = {k: v for k, v in tree.items() if k not in ("result", "text", "reason")}
        return cls(tree["result"], tree["text"], tree["reason"], rest)


# -------------------------------------------------------------------- identities
def run_identities(method: str) -> list[dict[str, Any]] | None:
    """Run the tests of a method's identities ("*": of all methods'): name, text, methods and outcome of each; None without tests.

    Raises `PoloptError` when the tests could not be collected.
    """
    root = stored.repository()
    if root is None or not (root / "tests" / "identities.py").is_file():
        return None
    files = [str(p) for p in sorted((root / "tests").rglob("test_*.py")) if "mark.identity(" in p.read_text(encoding="utf-8")]
    with TemporaryDirectory(prefix="polopt-identities-") as folder:
        report = Path(folder) / "report.json"
        words = ["-q", "-p", "no:cacheprovider", "--identity", method, "--identity-report", str(report)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, *files], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "No module named pytest" in done.stderr:
            return None
        if not report.is_file() or done.returncode not in (0, 1, 5):  # passed, failed, nothing collected
            raise PoloptError(f"the tests of identities could not be run:\n{(done.stdout + done.stderr).strip()[-2000:]}")
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    return found


def identities(method: Method, report: Sequence[Mapping[str, Any]] | None) -> Check:
    """The tests that show identities of this method; cases of one test count once, with the worst outcome."""
    if report is None:
        return Check("unknown", "identities unknown", "the tests are not part of this installation")
    tests: dict[str, dict[str, Any]] = {}
    for case in report:
        if method.name in case["methods"]:
            name = case["test"].partition("[")[0]
            entry = tests.setdefault(name, {"test": name, "text": case["text"], "cases": 0, "outcome": "passed"})
            entry["cases"] += 1
            if case["outcome"] != "passed" and entry["outcome"] != "failed":
                entry["outcome"] = case["outcome"] or "failed"
    bad = [t["test"] for t in tests.values() if t["outcome"] == "failed"]
    good = sum(t["outcome"] == "passed" for t in tests.values())
    details = {"passed": good, "failed": len(bad), "tests": list(tests.values())}
    if bad:
        which = f"{bad[0]} fails" if len(bad) == 1 else f"{len(bad)} of {len(tests)} identities fail, {bad[0]} first"
        return Check("failed", "identities FAIL", which, details)
    if not good:
        return Check("none", "no identities", "no test is marked as an identity of it", details)
    return Check("ok", f"{good} identit{'y' if good == 1 else 'ies'}", "", details)


def own_identity(method: Method) -> Check:
    """The one identity that a method of somebody's own can bring along: the neutral values that it declares."""
    if method.parent is None or not any(method.neutral.values()):
        return identities(method, [])
    proof = verify(method)
    shown = [line.slot for line in proof.lines if line.status == "proven"]
    text = f"with neutral values put in ({', '.join(shown)}) it computes what {proof.parent} does"
    test = {"test": f"polopt diff {proof.parent} {method.name}", "text": text, "cases": 1, "outcome": "passed"}
    if not proof.holds:
        slots = [line.slot for line in proof.lines if line.status == "failed"]
        why = proof.problem or f"its neutral value of {', '.join(slots)} does not hold"
        test["outcome"] = "failed"
        return Check(
            "failed", "identities FAIL", f"difference from {proof.parent}: {why}", {"passed": 0, "failed": 1, "tests": [test]}
        )
    return Check("ok", "1 identity", "", {"passed": 1, "failed": 0, "tests": [test]})


# -------------------------------------------------------------------- theory and trajectories
def oracle(method: Method) -> Check:
    """The expected first gradient by enumeration of exact worlds, against theory."""
    from polopt.evidence.proof.oracle import oracle as consult

    found = consult(method)
    if found is None:
        return Check("none", "no oracle", "theory gives no closed form for its parts")
    details = {"error": found.error, "tolerance": found.tolerance, "detail": found.detail, "without": list(found.without)}
    if not found.holds:
        return Check(
            "failed", "oracle FAILS", f"oracle: off by {found.error:.1e} (at most {found.tolerance:.0e}): {found.detail}", details
        )
    without = f" without {' and '.join(found.without)}" if found.without else ""
    return Check("ok", f"oracle {found.error:.0e}{without}", "", details)


def golden_trajectory(method: Method, path: Path, *, record: bool = False) -> Check:
    """Repeat the stored trajectory, or (`record`) store it anew."""
    if record:
        made = golden.record(method, *small.world(method), path)
        return Check("ok", "golden recorded", "", {"mode": "recorded", "error": 0.0, "stack": dict(made.stack)})
    if not path.is_file() and stored.repository() is None:
        return Check("unknown", "golden unknown", "golden trajectories are not part of this installation")
    if not path.is_file():
        return Check("none", "no golden trajectory", "no golden trajectory is stored (--record makes one)")
    kept = golden.load(path)
    found = golden.check(method, kept)
    details = {
        "mode": found.mode,
        "identical": found.identical,
        "error": found.error,
        "stack": dict(kept.stack),
        "differs": found.differs,
    }
    if not found.ok:
        tail = f" ({found.message})" if found.message else ""
        return Check("failed", "golden DIFFERS", f"golden trajectory differs from update {found.differs} on{tail}", details)
    return Check("ok", "golden bit-identical" if found.identical else f"golden within {found.error:.0e}", "", details)


def kill_and_resume(method: Method) -> Check:
    """A run killed by SIGKILL and resumed, against the undisturbed one."""
    found = survival.check(method, *small.world(method))
    return Check("ok", "resume ok") if found.ok else Check("failed", "resume FAILS", f"kill and resume: {found.message}")


def invariant(method: Method) -> Check:
    """Micro-batches and padding, on random batches."""
    found = invariance.check(method)
    details = {"error": found.error, "tolerance": invariance.TOLERANCE, "where": found.where, "batches": found.batches}
    if not found.ok:
        return Check("failed", "invariance FAILS", f"invariance: off by {found.error:.1e} at {found.where}", details)
    return Check("ok", f"invariance {found.error:.0e}", "", details)


class Best:
    """An observer that keeps the best score after training began; an untrained policy may be lucky."""

    score = float("-inf")

    def start(self, info: Mapping[str, Any]) -> None: ...

    def event(self, event: Event) -> None:
        """Look at an evaluation."""
        if event.evaluated:
            self.score = max(self.score, float(event.metrics["eval_score"]))

    def end(self, summary: Mapping[str, Any]) -> None: ...


def floor(method: Method) -> Check:
    """Every seed must reach the declared score, at some evaluation within the budget."""
    if (f := method.floor) is None:
        return Check("none", "no floor", "it declares no learning floor")
    scores = {}
    for seed in range(f.seeds):
        given = {"evaluate.points": 5, "evaluate.every": 0, "threads": 1, **f.settings, "budget": f.budget, "seed": seed}
        best = Best()
        drive(resolve(method, f.task, given, sources=f"floor of {method.name}"), None, [best])
        scores[seed] = best.score
    lowest = min(scores, key=lambda s: scores[s])
    details = {"task": f.task, "budget": f.budget, "floor": f.score, "scores": {str(k): v for k, v in scores.items()}}
    text = f"floor {scores[lowest]:.3g} {'>=' if scores[lowest] >= f.score else '<'} {f.score:g}"
    if scores[lowest] >= f.score:
        return Check("ok", text, "", details)
    return Check(
        "failed", text, f"floor: seed {lowest} reaches {scores[lowest]:.3g} on {f.task} in {f.budget}, below {f.score:g}", details
    )


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that cannot be made on this method says why; one that raises has failed."""
    try:
        return check()
    except Misfit as error:
        return Check("none", f"no {name}", f"{name}: {error.reason}")
    except Exception as error:
        return Check("failed", f"{name} FAILS", f"{name}: {type(error).__name__}: {error}")


__all__ = [
    "Check", "Result", "floor", "golden_trajectory", "guarded", "identities", "invariant", "kill_and_resume", "oracle",
    "own_identity", "run_identities",
]  # fmt: skip
