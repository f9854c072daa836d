"""Contestants as they are asked for: a method with settings of its own under a name, or an external program."""

from __future__ import annotations

import re
import shlex
import shutil
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError, unknown
from polopt.method import Method
from polopt.registry import get_method
from polopt.run import UNITS

if TYPE_CHECKING:
    from polopt.run import Budget

#: What the command of an external program may refer to, besides the unit of the budget.
PLACEHOLDERS = ("task", "seed", "budget", "out", "episodes", "points")
#: Longer names are shortened as folders' names (file systems take 255 bytes).
LONGEST = 120


@dataclass(frozen=True)
class Entry:
    """A contestant as asked: a method (by name or as a value) with settings of its own, or the command of a program."""

    name: str
    method: str | Method = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def folder(self) -> str:
        """The name as a folder's name."""
        whole = slug(self.name)
        return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 9]}-{sha256(self.name.encode()).hexdigest()[:8]}"


def slug(text: str) -> str:
    """Letters, digits and a few signs that are safe in a file's name; everything else becomes a dash. Never hidden, never `..`."""
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).strip("-").lstrip(".") or "x"


def parse(word: str) -> Entry:
    """`ppo`, `ppo,epochs=4,lr=1e-3`, `mine=ppo,epochs=4` or `file.py:NAME`; a value may hold commas (`policy.hidden=64,64`)."""
    segments = word.split(",")
    name, equals, method = segments[0].rpartition("=")
    settings: dict[str, str] = {}
    last = ""
    for segment in segments[1:]:
        path, sign, value = segment.partition("=")
        if sign:
            last = path.strip().removeprefix("--")
            if last in settings:
                raise CallError(f"contestant '{word}' sets {last} twice")
            settings[last] = value
        elif last:
            settings[last] += f",{segment}"
        else:
            raise CallError(f"contestant '{word}': '{segment}' is no setting; write METHOD,path.to.setting=VALUE")
    if not method:
        raise CallError(f"contestant '{word}' names no method; write METHOD, METHOD,setting=VALUE or NAME=METHOD,setting=VALUE")
    return _named(name if equals else None, method, settings)


def _named(name: str | None, method: str | Method, settings: Mapping[str, Any]) -> Entry:
    found = get_method(method) if isinstance(method, str) else method
    if not isinstance(found, Method):
        raise CallError(f"a contestant is a method's name, a Method or (method, settings), got {type(found).__name__}: {found!r}")
    if isinstance(method, str) and ".py:" not in method:
        method = found.name
    own = ",".join(f"{k}={v}" for k, v in settings.items())
    return Entry(name or (f"{found.name},{own}" if own else found.name), method, dict(settings))


def entries_of(given: Any) -> list[Entry]:
    """Contestants from a list of words, methods or (method, settings), or from a mapping of names to these."""
    if isinstance(given, str | Method):
        given = [given]
    pairs: Iterable[tuple[str | None, Any]]
    pairs = given.items() if isinstance(given, Mapping) else ((None, g) for g in given)
    found = []
    for name, what in pairs:
        if isinstance(what, Entry):
            found.append(what)
        elif isinstance(what, str):
            plain = parse(what)
            found.append(Entry(name, plain.method, plain.settings) if name else plain)
        elif isinstance(what, tuple | list) and len(what) == 2 and isinstance(what[1], Mapping):
            found.append(_named(name, what[0], what[1]))
        else:
            found.append(_named(name, what, {}))
    return found


def external_entries(given: Mapping[str, str] | Sequence[str]) -> list[Entry]:
    """External programs from `NAME=COMMAND` words or a mapping of names to commands."""
    if isinstance(given, str):
        given = [given]
    pairs = list(given.items()) if isinstance(given, Mapping) else [_split_command(word) for word in given]
    return [Entry(name.strip(), command=command) for name, command in pairs]


def _split_command(word: str) -> tuple[str, str]:
    name, equals, command = word.partition("=")
    if not equals or not name.strip() or not command.strip() or " " in name.strip():
        raise CallError(f"--external '{word}': write NAME=COMMAND, e.g. \"sb3=python sb3_ppo.py --seed {{seed}} --out {{out}}\"")
    return name, command


def refuse_names(entries: Sequence[Entry]) -> None:
    """Raise `CallError` for no contestants and for names that are equal."""
    if not entries:
        raise CallError("nothing to compare: name at least one method, e.g. polopt compare ppo a2c --task gym:CartPole-v1 ...")
    seen: dict[str, Entry] = {}
    for e in entries:
        key = e.folder.lower()
        if key in seen:
            other = seen[key].name
            same = f"two contestants are called '{e.name}'" if other == e.name else f"'{other}' and '{e.name}' are too alike"
            raise CallError(f"{same}; give one a name of its own: mine={word_of(e) if e.method else e.name}")
        seen[key] = e


def word_of(entry: Entry) -> str:
    """The word that asks for this contestant on the command line."""
    method = entry.method if isinstance(entry.method, str) else f"<{entry.method.name}>"
    base = ",".join([method, *(f"{k}={plain(v)}" for k, v in entry.settings.items())])
    default = entry.name == base or (".py:" in base and not entry.settings and entry.name == base.rpartition(":")[2])
    return base if default else f"{entry.name}={base}"


def plain(value: Any) -> str:
    """A value as the command line writes it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(plain(v) for v in value)
    return str(value)


# -------------------------------------------------------------------- external programs
def fill(command: str, *, task: str, seed: int, budget: Budget, text: str, out: str, episodes: int, points: int) -> list[str]:
    """The words of an external program's command with everything filled in; no shell reads it.

    `{budget}` is the budget as text; `{decisions}` (or another unit) its amount, refused where the budget has another unit.
    """
    values = {"task": task, "seed": seed, "budget": text, "out": out, "episodes": episodes, "points": points}
    values[budget.unit] = f"{budget.amount:.0f}" if budget.amount == int(budget.amount) else f"{budget.amount!r}"
    try:
        words = shlex.split(command)
        fields = [name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None]
    except ValueError as error:
        raise CallError(f"--external command '{command}' cannot be read: {error}; write {{{{ and }}}} for braces") from error
    for name in fields:
        if name in UNITS and name != budget.unit:
            raise CallError(f"--external command '{command}' asks for {{{name}}}, but the budget is in {budget.unit}")
        if name not in values:
            problem = unknown("placeholder", f"{{{name}}}", [f"{{{k}}}" for k in (*PLACEHOLDERS, *UNITS)])
            raise CallError(f"--external command '{command}': {problem}")
    return [word.format(**values) for word in words]


def refuse_command(entry: Entry, words: Sequence[str]) -> None:
    """Raise `CallError` if the program does not exist or cannot know where to write."""
    if not words or shutil.which(words[0]) is None:
        raise CallError(f"--external {entry.name}: there is no program '{words[0] if words else ''}'")
    if "{out}" not in entry.command:
        raise CallError(f"--external {entry.name}: the command needs {{out}}, the folder for its metrics.jsonl")


__all__ = [
    "PLACEHOLDERS", "Entry", "entries_of", "external_entries", "fill", "parse", "plain", "refuse_command", "refuse_names", "slug",
    "word_of",
]  # fmt: skip
