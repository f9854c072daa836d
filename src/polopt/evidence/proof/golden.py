"""Golden trajectories: a fixed small run, recorded once, that every later version must repeat.

Where the same versions run on the same kind of processor, the run itself is repeated and every update must leave the same
bits. Elsewhere the recorded batches take the collector's place, so that nothing is drawn, and the parameters must end within
`TOLERANCE` of the recorded ones.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.errors import CallError
from polopt.evidence.proof import packed
from polopt.interfaces import State
from polopt.loops.improve import Improve
from polopt.loops.stages import Staged
from polopt.method import Method
from polopt.overrides import resolve
from polopt.recipe import Recipe
from polopt.tree import fill, strip

UPDATES = 50
TOLERANCE = 1e-5  # of every parameter, after all updates on recorded batches
FORMAT = 1
Mode = Literal["live", "replay"]


@dataclass(frozen=True)
class Golden:
    """A recorded run: where it ran, the policy it started from, its batches, and what each update left.

    chain: fingerprint of the trained parameters before the first and after every update. sketch [updates,4]: fixed projections
    of them, which show where another processor's numbers part. final [P]: the parameters after the last update.
    """

    method: str
    task: str
    settings: Mapping[str, Any]
    stack: Mapping[str, str]
    start: State
    batches: Sequence[Mapping[str, Batch]]
    chain: Sequence[str]
    sketch: Float[Tensor, "updates 4"]
    final: Float[Tensor, " P"]


@dataclass(frozen=True)
class Outcome:
    """Whether a trajectory was repeated. differs: the first update (from 1) after which it was not, None if it was."""

    mode: Mode
    identical: bool
    error: float  # largest deviation of a final parameter
    differs: int | None
    message: str = ""

    @property
    def ok(self) -> bool:
        """Bit-identical live, within the tolerance on recorded batches."""
        return self.differs is None


# -------------------------------------------------------------------- running
@dataclass
class Tape:
    """The batches of all iterations: `kept` as they were collected, or `given` by a recording, `played` so far."""

    given: Sequence[Mapping[str, Batch]] | None = None
    kept: list[dict[str, Batch]] = field(default_factory=list)
    played: int = 0


class Recorder(Improve):
    """A run that keeps the batches of its iterations, or takes them from a recording instead of collecting."""

    def __init__(self, *args: Any, tape: Tape, **named: Any) -> None:
        super().__init__(*args, **named)
        self.tape = tape

    def collect(self, clock: Clock) -> dict[str, Batch]:
        """What the collector returned (kept), or what was recorded for this iteration."""
        if self.tape.given is None:
            batches = super().collect(clock)
            self.tape.kept.append(batches)
            return batches
        batches = {k: replace(b, clock=clock) for k, b in self.tape.given[self.tape.played].items()}
        self.tape.played += 1
        for batch in batches.values():
            self.observe("drawn", batch)
        return batches


@dataclass
class Trace:
    """What the updates of a run left."""

    start: State = field(default_factory=dict)
    chain: list[str] = field(default_factory=list)
    sketch: list[Tensor] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.zeros(0))
    batches: list[dict[str, Batch]] = field(default_factory=list)


def trace(
    method: Method, task: str, settings: Mapping[str, Any], start: State | None = None,
    batches: Sequence[Mapping[str, Batch]] | None = None, updates: int = UPDATES,
) -> Trace:  # fmt: skip
    """Run `updates` iterations, live or on recorded batches from a recorded start."""
    fixed = {**settings, "budget": f"{updates}-updates", "optim.compile": "never", "threads": 1, "device": "cpu"}
    resolved = resolve(method, task, fixed, sources="golden trajectory")
    tape = Tape(batches)
    make = functools.partial(Recorder, tape=tape)
    chosen = resolved.method, resolved.task, resolved.settings
    run = Staged(resolved.method, *chosen[1:], loop=make) if isinstance(resolved.method, Recipe) else make(*chosen)
    try:
        if start is not None:
            run.policy.load(start)
        found = Trace(start=_copy(run.policy.state()), chain=[fingerprint(run.flat.data)])
        for _ in range(updates):
            run.step()
            found.chain.append(fingerprint(run.flat.data))
            found.sketch.append(sketch(run.flat.data))
        found.final, found.batches = run.flat.data.detach().clone(), tape.kept
    finally:
        run.collector.close()
    return found


def _copy(state: State) -> State:
    tensors: dict[str, Tensor] = {}
    copied: State = fill(strip(state, "", tensors), tensors)
    return copied


def fingerprint(parameters: Tensor) -> str:
    """SHA-256 of the parameters' bits."""
    return hashlib.sha256(parameters.detach().contiguous().cpu().numpy().tobytes()).hexdigest()


def sketch(parameters: Tensor) -> Float[Tensor, " 4"]:
    """Four fixed projections of the parameters, in double precision."""
    x = parameters.detach().cpu().double()
    place = torch.arange(1, x.numel() + 1, dtype=torch.float64)
    return torch.stack([(torch.cos(k * place) * x).sum() for k in (1.0, 2.0, 3.0, 5.0)])


def stack() -> dict[str, str]:
    """What must be equal for bits to be equal: PyTorch, NumPy, Python's minor version, processor and its vector instructions."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "processor": f"{platform.system()}-{platform.machine()}-{_model()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def _model() -> str:
    """The processor's model, for which libraries choose different routines; empty where it is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for key, value in known.items() if key.strip() == "model name"), "")


# -------------------------------------------------------------------- recording and checking
def record(method: Method, task: str, settings: Mapping[str, Any], path: Path, *, updates: int = UPDATES) -> Golden:
    """Run the trajectory and store it."""
    found = trace(method, task, settings, updates=updates)
    made = Golden(
        method.name, task, dict(settings), stack(), found.start, found.batches, found.chain, torch.stack(found.sketch), found.final
    )
    save(made, path)
    return made


def check(method: Method, golden: Golden, mode: Mode | None = None) -> Outcome:
    """Repeat a recorded trajectory with `method`: live on the stack it was recorded on (or if asked), else on its batches."""
    mode = mode or ("live" if stack() == dict(golden.stack) else "replay")
    return _live(method, golden) if mode == "live" else _replay(method, golden)


def _live(method: Method, golden: Golden) -> Outcome:
    found = trace(method, golden.task, golden.settings, updates=len(golden.chain) - 1)
    error = _error(found.final, golden.final)
    pairs = enumerate(zip(found.chain, golden.chain, strict=True))
    differs = next((i for i, (a, b) in pairs if a != b), None)
    if differs is None and error > 0:
        last = len(golden.chain) - 1
        return Outcome("live", False, error, last, "the stored end is not the one of its last hash: the file is damaged")
    if differs is None:
        return Outcome("live", True, error, None)
    if differs == 0:
        return Outcome("live", False, error, 0, "the initial parameters differ")
    elsewhere = _replay(method, golden)
    where = f"update {differs} is the first that leaves other bits"
    if elsewhere.ok:
        tail = f"on the recorded batches it ends within {elsewhere.error:.0e}: what is collected differs, or rounding"
    else:
        tail = f"so it does on the recorded batches, {elsewhere.message}"
    return Outcome("live", False, error, differs, f"{where}; {tail}")


def _replay(method: Method, golden: Golden) -> Outcome:
    updates = len(golden.chain) - 1
    try:
        found = trace(method, golden.task, golden.settings, golden.start, golden.batches, updates)
    except CallError as problem:  # the parts now need a statistic that was not recorded
        return Outcome("replay", False, float("inf"), 1, f"the recorded batches do not serve it any more: {problem}")
    error = _error(found.final, golden.final)
    identical = found.chain == list(golden.chain)
    if error <= TOLERANCE:
        return Outcome("replay", identical, error, None)
    gaps = (torch.stack(found.sketch) - golden.sketch).abs().amax(1)
    first = next((i + 1 for i, gap in enumerate(gaps.tolist()) if not gap <= TOLERANCE), updates)
    return Outcome("replay", False, error, first, f"from update {first} on, and ends {error:.1e} away")


def _error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max().nan_to_num(float("inf"))) if a.numel() else 0.0


# -------------------------------------------------------------------- files
def save(golden: Golden, path: Path) -> None:
    """Write a recording as one safetensors file."""
    tensors, about = packed.pack([dict(b) for b in golden.batches])
    tensors |= {"sketch": golden.sketch, "final": golden.final}
    skeleton = strip(golden.start, "start", tensors)
    document = {
        "format": FORMAT, "method": golden.method, "task": golden.task, "settings": golden.settings, "stack": golden.stack,
        "start": skeleton, "batches": about, "chain": list(golden.chain),
    }  # fmt: skip
    packed.write(path, tensors, document)


def load(path: Path) -> Golden:
    """Read a recording. Raises `CallError` naming a damaged file."""
    tensors, d = packed.read(path)
    try:
        if d["format"] != FORMAT:
            raise CallError(f"{path} has format {d['format']}, this version reads {FORMAT}; record it again")
        return Golden(
            d["method"], d["task"], d["settings"], d["stack"], fill(d["start"], tensors),
            packed.unpack(tensors, d["batches"]), d["chain"], tensors["sketch"], tensors["final"],
        )  # fmt: skip
    except (KeyError, TypeError, RuntimeError) as error:
        raise CallError(f"{path} is damaged: {error!r}; record it again") from error


__all__ = [
    "TOLERANCE",
    "UPDATES",
    "Golden",
    "Outcome",
    "check",
    "fingerprint",
    "load",
    "record",
    "save",
    "sketch",
    "stack",
    "trace",
]
