"""Certificates: what was checked about a method, in one JSON file and one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polopt import registry
from polopt.errors import unknown
from polopt.evidence.proof import checks, stored
from polopt.evidence.proof.checks import Check
from polopt.evidence.proof.stored import registered
from polopt.method import Method
from polopt.run import environment, finite

#: In the order in which they stand in the line. Everything but the identities needs no tests and can run in any process.
OTHERS = ("oracle", "golden", "resume", "invariance", "floor")
CHECKS = ("identities", *OTHERS)
#: What a method of the library must have, not only pass.
REQUIRED = ("identities", "golden", "resume", "invariance", "floor")
#: Checks that know what is right; the others only tell whether numbers stay what they are.
TELLING = ("identities", "oracle", "floor")
FORMAT = 1


@dataclass(frozen=True)
class Certificate:
    """What was checked about a method, and whether that suffices."""

    method: str
    fingerprint: str
    found: Mapping[str, Check]
    registered: bool
    seconds: float
    command: str
    date: str
    versions: Mapping[str, Any]

    @property
    def reasons(self) -> list[str]:
        """Why it is not certified: failed checks, and those that it must have and lacks.

        A method of the library must have all of `REQUIRED`, any other one check that knows what is right.
        """
        failed = [c.reason for c in self.found.values() if c.result == "failed"]
        lacking = [c.reason for k, c in self.found.items() if c.result == "none" and self.registered and k in REQUIRED]
        telling = [c.result for k, c in self.found.items() if k in TELLING]
        if telling and not failed and not self.registered and "ok" not in telling:
            lacking.append("nothing checked here could tell a wrong sign: declare a floor or neutral values")
        return [*failed, *lacking]

    @property
    def certified(self) -> bool:
        """Every check passed, as far as the method can be checked."""
        return not self.reasons and any(c.result == "ok" for c in self.found.values())

    @property
    def line(self) -> str:
        """The certificate in one line."""
        if self.certified:
            return f"{self.method}: certified ({', '.join(c.text for c in self.found.values())}) in {self.seconds:.0f} s"
        return f"{self.method}: NOT certified: {'; '.join(self.reasons) or 'nothing could be checked'}"

    def json(self) -> dict[str, Any]:
        """The certificate as it is stored."""
        about = {
            "format": FORMAT, "method": self.method, "certified": self.certified, "line": self.line, "reasons": self.reasons,
            "fingerprint": self.fingerprint, **{k: c.json() for k, c in self.found.items()}, "date": self.date,
            "seconds": round(self.seconds, 1), "command": self.command, "commit": self.versions.get("commit"),
            "versions": dict(self.versions),
        }  # fmt: skip
        tree: dict[str, Any] = finite(about)
        return tree

    def write(self, folder: Path) -> Path:
        """Store it as `folder`/<method>.json, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.method}.json"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def certify(
    method: Method,
    *,
    only: Sequence[str] = CHECKS,
    record: bool = False,
    golden: Path | None = None,
    report: Sequence[Mapping[str, Any]] | None = None,
    command: str = "",
) -> Certificate:
    """Check a method. Nothing is stored but, with `record`, its golden trajectory.

    only: which of `CHECKS`. golden: the folder of golden trajectories. report: outcomes of tests of identities that ran already.
    """
    for name in only:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    began = time.monotonic()
    found = {name: timed(name, lambda name=name: _check(name, method, record, golden, report)) for name in CHECKS if name in only}  # type: ignore[misc]
    return _made(method, found, time.monotonic() - began, command or f"polopt certify {method.name}")


def timed(name: str, check: Callable[[], Check]) -> Check:
    """A guarded check with the seconds that it took."""
    began = time.monotonic()
    found = checks.guarded(name, check)
    return Check(found.result, found.text, found.reason, {**found.details, "seconds": round(time.monotonic() - began, 2)})


def _check(name: str, method: Method, record: bool, golden: Path | None, report: Sequence[Mapping[str, Any]] | None) -> Check:
    if name == "identities":
        if not registered(method):
            return checks.own_identity(method)
        return checks.identities(method, checks.run_identities(method.name) if report is None else report)
    if name == "golden":
        return checks.golden_trajectory(method, _golden_path(method, golden), record=record)
    simple = {"oracle": checks.oracle, "resume": checks.kill_and_resume, "invariance": checks.invariant, "floor": checks.floor}
    return simple[name](method)


def _golden_path(method: Method, folder: Path | None) -> Path:
    name = f"{method.name}.safetensors"
    if folder is not None:
        return folder / name
    return stored.find(stored.GOLDEN, name) or stored.home() / stored.GOLDEN / name


def _made(method: Method, found: Mapping[str, Check], seconds: float, command: str) -> Certificate:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Certificate(method.name, stored.fingerprint(method), found, registered(method), seconds, command, now, environment())


# -------------------------------------------------------------------- all of them
def certify_all(
    names: Sequence[str],
    *,
    jobs: int = 1,
    out: Path | None = None,
    record: bool = False,
    golden: Path | None = None,
    echo: Callable[[Certificate], None] = lambda certificate: None,
) -> list[Certificate]:
    """Certify registered methods side by side, one thread each, and store the certificates in `out`.

    The tests of identities run once for all. echo is called with each certificate as soon as it is made.
    """
    known = registry.all_methods()
    for name in names:
        if name not in known:
            raise unknown("method", name, known)
    out = out or stored.home() / stored.CERTIFICATES
    made: dict[str, Certificate] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        tests = pool.submit(checks.run_identities, "*")
        waiting: dict[Future[dict[str, Any]], str] = {pool.submit(_others, n, record, golden): n for n in names}
        report = tests.result()
        for future in as_completed(waiting):
            name = waiting[future]
            method, result = known[name], future.result()
            own = {k: Check.of(v) for k, v in result["found"].items()}
            found = {"identities": timed("identities", lambda m=method: checks.identities(m, report)), **own}  # type: ignore[misc]
            made[name] = _made(method, found, result["seconds"], f"polopt certify {name}")
            made[name].write(out)
            echo(made[name])
    return [made[n] for n in names]


def _one_thread() -> None:
    """At the start of a worker process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _others(name: str, record: bool, golden: Path | None) -> dict[str, Any]:
    """Everything but the identities of a registered method, as plain values."""
    found = certify(registry.get_method(name), only=OTHERS, record=record, golden=golden)
    return {"found": {k: c.json() for k, c in found.found.items()}, "seconds": found.seconds}


__all__ = ["CHECKS", "OTHERS", "Certificate", "certify", "certify_all", "registered"]
