"""What a comparison runs: contestants with every setting resolved, or a refusal that says what would work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError, Misfit, unknown
from polopt.evidence.compare.amounts import refuse_amount
from polopt.evidence.compare.entries import Entry, fill, parse, plain, refuse_command, refuse_names, slug, word_of
from polopt.overrides import Layer, Resolved, resolve
from polopt.paths import guess
from polopt.registry import fitting
from polopt.run import Budget

if TYPE_CHECKING:
    from polopt.interfaces import Task

#: Episodes or prompts per evaluation where neither the user nor the task says: scores of seeds vary more than those of episodes.
EPISODES = 20
#: Settings that the comparison itself decides, and the option that does.
DECIDED = {"seed": "--seeds", "budget": "--budget", "evaluate.points": "--points", "evaluate.every": "--points"}
#: Seeds of tuning start here, away from those of the comparison.
TUNE_SEED = 1000


@dataclass(frozen=True)
class Asked:
    """A comparison as asked for. `text` is the budget in its plain form; `source` says where settings were given."""

    entries: tuple[Entry, ...]
    task: str | Task
    seeds: tuple[int, ...]
    budget: Budget
    settings: Mapping[str, Any] = field(default_factory=dict)
    points: int = 10
    episodes: int | None = None
    metric: str = "eval_score"
    higher_is_better: bool = True
    baseline: str | None = None
    tune: int = 0
    tune_seeds: int = 2
    search: tuple[str, ...] = ()
    source: str = "call"

    @property
    def text(self) -> str:
        """The budget in a form that is the same however it was written."""
        x = self.budget.amount
        return f"{int(x) if x == int(x) else x}-{self.budget.unit}"

    @property
    def task_name(self) -> str:
        """The task's name."""
        return self.task if isinstance(self.task, str) else self.task.name


@dataclass(frozen=True)
class Arm:
    """A contestant ready to run. resolved is None for an external program; its seed is the first one."""

    entry: Entry
    layers: tuple[Layer, ...] = ()
    resolved: Resolved | None = None
    tuned: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0  # settings that tuning tried
    note: str = ""

    @property
    def name(self) -> str:
        """The contestant's name."""
        return self.entry.name

    def at(self, seed: int) -> Resolved:
        """The run of one seed."""
        assert self.resolved is not None
        return replace(self.resolved, settings=replace(self.resolved.settings, seed=seed))


# -------------------------------------------------------------------- reading what was asked
def seeds_of(given: int | str | Sequence[int]) -> tuple[int, ...]:
    """5 means 0..4; `0,3,7` and sequences are the seeds themselves. None at all, negative ones and duplicates are refused."""
    if isinstance(given, str):
        words = [w.strip() for w in given.split(",") if w.strip()]
        if not words or not all(re.fullmatch(r"-?[0-9]+", w) for w in words):
            raise CallError(f"--seeds '{given}': write a number of seeds (5) or the seeds themselves (0,3,7)")
        given = int(words[0]) if "," not in given else [int(w) for w in words]
    try:
        if isinstance(given, bool):
            raise TypeError
        if not isinstance(given, Iterable):
            given = index(given)  # also NumPy's integers
        seeds = tuple(range(given)) if isinstance(given, int) else tuple(index(s) for s in given)
    except TypeError:
        raise CallError(f"seeds = {given!r}: expected a number or a list of seeds") from None
    if not seeds or (isinstance(given, int) and given < 1):
        raise CallError(f"seeds = {given}: at least one seed is needed; 5 is a good start")
    if bad := [s for s in seeds if s < 0]:
        raise CallError(f"seed {bad[0]} is negative")
    if twice := [s for s in seeds if seeds.count(s) > 1]:
        raise CallError(f"seed {twice[0]} is given twice; runs of the same seed are the same run")
    return seeds


def seeds_text(seeds: Sequence[int]) -> str:
    """What `--seeds` takes."""
    return str(len(seeds)) if tuple(seeds) == tuple(range(len(seeds))) else ",".join(map(str, seeds)) + ("," * (len(seeds) == 1))


def check(asked: Asked) -> None:
    """Raise `CallError` for what needs no look at the methods."""
    refuse_names(asked.entries)
    names = [e.name for e in asked.entries]
    if asked.baseline is not None and asked.baseline not in names:
        raise unknown("baseline: there is no contestant", asked.baseline, names)
    for path in asked.settings:
        if path in DECIDED:
            raise CallError(f"--{path} is decided by the comparison; use {DECIDED[path]}")
    for entry in asked.entries:
        for path in entry.settings:
            if path in DECIDED:
                raise CallError(f"contestant '{entry.name}' sets {path}, which is the same for all; use {DECIDED[path]}")
    for what, n in (("points", asked.points), ("tune-seeds", asked.tune_seeds)):
        if n < 1:
            raise CallError(f"--{what} {n}: at least 1 is needed")
    if asked.episodes is not None and asked.episodes < 1:
        raise CallError(f"--episodes {asked.episodes}: at least 1 is needed")
    if asked.tune < 0:
        raise CallError(f"--tune {asked.tune}: a number of settings to try, or 0")
    if asked.search and not asked.tune:
        raise CallError("--search says what --tune N varies; give --tune as well")
    if asked.tune and (both := set(asked.seeds) & set(tuning_seeds(asked))):
        raise CallError(f"seed {min(both)} is a seed of tuning ({TUNE_SEED} and up); compare on other seeds")


def tuning_seeds(asked: Asked) -> tuple[int, ...]:
    """The seeds on which settings are tried."""
    return tuple(range(TUNE_SEED, TUNE_SEED + asked.tune_seeds))


# -------------------------------------------------------------------- resolving
def ready(asked: Asked) -> list[Arm]:
    """Every contestant with its settings resolved. Raises `CallError` for what cannot run, before anything does."""
    check(asked)
    task = _task(asked)
    arms: list[Arm] = []
    misfits: dict[str, Misfit] = {}
    for entry in asked.entries:
        if entry.command:
            arms.append(Arm(entry))
            continue
        try:
            arms.append(arm_of(asked, entry))
        except Misfit as error:
            misfits[entry.name] = error
    if misfits:
        raise _no_fit(asked, misfits, task)
    for arm in arms:
        if arm.entry.command:
            refuse_command(arm.entry, external_words(asked, arm.entry, asked.seeds[0], Path("OUT")))
    refuse_amount(asked.text, arms)
    return arms


def arm_of(asked: Asked, entry: Entry, tuned: Mapping[str, Any] | None = None, seed: int | None = None) -> Arm:
    """One contestant with its settings: own ones over those for all, and tuned ones over both."""
    base: dict[str, Any] = {
        "seed": asked.seeds[0] if seed is None else seed, "budget": asked.text, "evaluate.points": asked.points,
        "checkpoint.keep": 1, "threads": 1,
    }  # fmt: skip
    given = dict(asked.settings) | ({"evaluate.episodes": asked.episodes} if asked.episodes is not None else {})

    def layers() -> tuple[Layer, ...]:
        return (
            Layer(base, "compare"), Layer(given, asked.source), Layer(entry.settings, f"contestant {entry.name}"),
            Layer(tuned or {}, "tuning"),
        )  # fmt: skip

    def attempt() -> Resolved:
        return resolve(entry.method, asked.task, layers())

    try:
        found = attempt()
        if found.origin.get("evaluate.episodes") == "default":
            base["evaluate.episodes"] = EPISODES
            found = attempt()
    except Misfit:
        raise
    except CallError as error:
        raise _foreign(asked, entry, error) from error
    return Arm(entry, layers(), found, dict(tuned or {}))


def _foreign(asked: Asked, entry: Entry, error: CallError) -> CallError:
    """An error of one contestant's settings; one that only others have is explained."""
    for path in asked.settings:
        if f"unknown setting '{path}'" in str(error):
            value = plain(asked.settings[path])
            having = [e for e in asked.entries if e is not entry and e.method and _has(asked, e, path)]
            alone = " ".join(f"{word_of(e)},{path}={value}" for e in having)
            hint = f"; give it to the others alone: {alone}" if having else "; no contestant has it"
            return CallError(f"{entry.name}: {error}{hint}")
    return CallError(f"{entry.name}: {error}")


def _has(asked: Asked, entry: Entry, path: str) -> bool:
    try:
        resolve(entry.method, asked.task, [Layer(entry.settings), Layer({path: asked.settings[path]})])
    except CallError as error:
        return f"unknown setting '{path}'" not in str(error)
    return True


def _task(asked: Asked) -> Task | None:
    """The task with its options, checked; None where only external programs run, on a task of their own."""
    if not isinstance(asked.task, str):
        return asked.task
    if all(e.command for e in asked.entries):
        return None
    from polopt.tasks import make

    options = {k.partition(".")[2]: v for k, v in asked.settings.items() if k.startswith(("options.", "task."))}
    made = make(asked.task, {k: guess(v) if isinstance(v, str) else v for k, v in options.items()})
    check = getattr(made, "check", None)
    if check is not None:
        check()
    return made


def _no_fit(asked: Asked, misfits: Mapping[str, Misfit], task: Task | None) -> CallError:
    """Why the first contestant cannot run, which of the others can, and which methods can."""
    fit = [e.name for e in asked.entries if e.method and e.name not in misfits]
    known = fitting(task) if task is not None else []
    text = next(iter(misfits.values())).reason
    if len(misfits) > 1:
        text += f" (nor can {', '.join(list(misfits)[1:])})"
    return CallError(
        f"{text}. Of these contestants {', '.join(fit) or 'none'} fit{'s' * (len(fit) == 1)} {asked.task_name}; "
        f"methods that fit: {', '.join(known) or 'none'}"
    )


def external_words(asked: Asked, entry: Entry, seed: int, out: Path) -> list[str]:
    """The command of an external contestant for one seed."""
    return fill(
        entry.command, task=asked.task_name, seed=seed, budget=asked.budget, text=asked.text, out=str(out),
        episodes=asked.episodes or EPISODES, points=asked.points,
    )  # fmt: skip


# -------------------------------------------------------------------- in words
def default_name(asked: Asked) -> str:
    """`compare-grpo-dapo-spell_backward`."""
    words = "-".join(["compare", *(e.folder for e in asked.entries), slug(asked.task_name.rpartition(":")[2].rpartition("/")[2])])
    if len(words) <= 100:
        return words
    from hashlib import sha256

    return f"{words[:90]}-{sha256(words.encode()).hexdigest()[:8]}"


def command_of(asked: Asked, out: Path, jobs: int | None = None) -> str:
    """The command that repeats the comparison; for methods or tasks made in Python, the call."""
    whole = isinstance(asked.task, str) and all(_can_be_written(e) for e in asked.entries)
    values = [*asked.settings.values(), *(v for e in asked.entries for v in e.settings.values())]
    if not whole or not all(isinstance(v, str | int | float | bool | tuple | list | None) for v in values):
        return _call_of(asked, out)
    words = ["polopt", "compare", *(word_of(e) for e in asked.entries if not e.command)]
    for e in asked.entries:
        words += ["--external", f"{e.name}={e.command}"] if e.command else []
    words += ["--task", asked.task_name, "--seeds", seeds_text(asked.seeds), "--budget", asked.text]
    optional: list[tuple[str, Any, Any]] = [
        ("--points", asked.points, 10), ("--episodes", asked.episodes, None), ("--metric", asked.metric, "eval_score"),
        ("--baseline", asked.baseline, None), ("--tune", asked.tune, 0), ("--tune-seeds", asked.tune_seeds, 2),
    ]  # fmt: skip
    for flag, value, default in optional:
        words += [flag, str(value)] if value != default else []
    for text in asked.search:
        words += ["--search", text]
    words += [] if asked.higher_is_better else ["--lower-is-better"]
    for path, value in asked.settings.items():
        words.append(f"--{path}={plain(value)}")
    words += ["--out", str(out)]
    return shlex.join([*words, *(["--jobs", str(jobs)] if jobs is not None else [])])


def _can_be_written(entry: Entry) -> bool:
    """Whether the command line can ask for this contestant: its name may hold signs that mean something else there."""
    if entry.command:
        return " " not in entry.name and "=" not in entry.name
    if not isinstance(entry.method, str):
        return False
    try:
        again = parse(word_of(entry))
    except CallError:
        return False
    return (again.name, again.method, set(again.settings)) == (entry.name, entry.method, set(entry.settings))


def _call_of(asked: Asked, out: Path) -> str:
    def shown(value: Any) -> str:
        simple = isinstance(value, str | int | float | bool | None | tuple | list)
        return repr(value) if simple else f"<{getattr(value, 'name', type(value).__name__)}>"

    entries = [
        f"{e.name!r}: ({shown(e.method)}, {{{', '.join(f'{k!r}: {shown(v)}' for k, v in e.settings.items())}}})"
        if e.settings
        else f"{e.name!r}: {shown(e.method)}"
        for e in asked.entries
        if not e.command
    ]
    rest = f"seeds={list(asked.seeds)}, budget={asked.text!r}, points={asked.points}"
    programs = {e.name: e.command for e in asked.entries if e.command}
    optional: list[tuple[str, Any, Any]] = [
        ("episodes", asked.episodes, None), ("metric", asked.metric, "eval_score"), ("external", programs, {}),
        ("lower_is_better", not asked.higher_is_better, False), ("baseline", asked.baseline, None), ("tune", asked.tune, 0),
        ("tune_seeds", asked.tune_seeds, 2), ("search", list(asked.search), []),
    ]  # fmt: skip
    rest += "".join(f", {name}={value!r}" for name, value, default in optional if value != default)
    over = f", overrides={{{', '.join(f'{k!r}: {shown(v)}' for k, v in asked.settings.items())}}}" if asked.settings else ""
    return f"polopt.compare({{{', '.join(entries)}}}, task={shown(asked.task)}, {rest}{over}, out={str(out)!r})"


__all__ = [
    "DECIDED", "EPISODES", "Arm", "Asked", "arm_of", "check", "command_of", "default_name", "external_words", "ready", "seeds_of",
    "seeds_text", "tuning_seeds",
]  # fmt: skip
