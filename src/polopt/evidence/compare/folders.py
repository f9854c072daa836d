"""The folder of one run of a comparison: whether it is finished, can be continued, is damaged, or belongs to other settings."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from polopt.config import Config, load_config, save_config
from polopt.errors import CallError, PoloptError
from polopt.overrides import Resolved
from polopt.run import RunFolder

RECORD = "run.json"
State = Literal["absent", "partial", "finished"]


@dataclass(frozen=True)
class Identity:
    """What makes a run that run, besides its seed: every setting, the text of the user's own code, and the task's data."""

    head: tuple[str | None, str | None, str | None]  # method, task, name
    values: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, resolved: Resolved) -> Identity:
        """What `config.yaml` and the files beside it would say."""
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(place)
            save_config(resolved, folder)
            head, values = _read(folder.path)
            return cls(head, values, _files(folder.path), code_of(resolved), data_of(resolved))

    def fingerprint(self, seed: int) -> str:
        """A hash of everything."""
        whole = [self.head, {**self.values, "seed": seed}, dict(self.files), self.code, dict(self.data)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=repr).encode()).hexdigest()[:16]

    def refuse_other(self, folder: Path, seed: int) -> None:
        """Raise `CallError` with the first setting in which the run in `folder` differs."""
        head, values = _read(folder)
        mine = dict(zip(("method", "task", "name"), self.head, strict=True)) | {**self.values, "seed": seed}
        other = dict(zip(("method", "task", "name"), head, strict=True)) | dict(values)
        for path in dict.fromkeys((*mine, *other)):
            if mine.get(path) != other.get(path):
                raise _other(folder, path, other.get(path), mine.get(path))
        for name in sorted({*self.files, *_files(folder)}):
            if self.files.get(name) != _files(folder).get(name):
                raise _other(folder, f"files/{name}", "another version of the file", "the present one")
        record = read_record(folder)
        code = record.get("code", self.code)
        if code != self.code:
            raise _other(folder, "code of your own parts", code, self.code)
        data = record.get("data", self.data)
        for name in sorted({*self.data, *data}):
            if data.get(name) != self.data.get(name):
                raise _other(folder, f"data {name}", "other contents of the file", "the present ones")


def _other(folder: Path, path: str, old: Any, new: Any) -> CallError:
    return CallError(
        f"{folder} holds a run with {path} = {'(absent)' if old is None else old}, this comparison has "
        f"{'(absent)' if new is None else new}; give another --out, or move that folder away to run it anew"
    )


def _read(folder: Path) -> tuple[tuple[str | None, str | None, str | None], dict[str, Any]]:
    """Header and values of a folder's config.yaml; references to files beside it become relative."""
    config = _config(folder)
    here = f"{folder.resolve()}/"

    def relative(value: Any) -> Any:
        if isinstance(value, list):
            return [relative(v) for v in value]
        if isinstance(value, dict):
            return {k: relative(v) for k, v in value.items()}
        return value.replace(here, "") if isinstance(value, str) else value

    head = (relative(config.method), relative(config.task), config.name)
    return head, {k: relative(v) for k, v in config.values.items()}


def _config(folder: Path) -> Config:
    """A folder's config.yaml, read once as long as it stays the same file: it takes longer than all else there is to look at."""
    path = folder / "config.yaml"
    try:
        stamp = path.stat()
    except OSError:
        return load_config(path)  # says what is wrong
    return _parsed(path, (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns))


@lru_cache(maxsize=1024)
def _parsed(path: Path, stamp: tuple[int, ...]) -> Config:
    return load_config(path)


def _files(folder: Path) -> dict[str, str]:
    inside = folder / "files"
    return {p.name: p.read_text(encoding="utf-8") for p in inside.iterdir() if p.is_file()} if inside.is_dir() else {}


def code_of(resolved: Resolved) -> str:
    """A hash of the source of parts, task and functions that are not the library's; empty if all are."""
    things: list[Any] = [type(p) for p in resolved.method.parts().values()]
    things.append(type(resolved.task))
    for value in resolved.settings.options.values():
        things += [v for v in (value if isinstance(value, list | tuple) else [value]) if callable(v)]
    texts = {_source(t) for t in things if not str(getattr(t, "__module__", "")).startswith("polopt.")}
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16] if texts else ""


def data_of(resolved: Resolved) -> dict[str, str]:
    """A hash for each data file that the task or its options name, and of names and sizes where the data is a folder."""
    domain, _, source = resolved.task.name.partition(":")
    named = [source] if domain == "data" else []
    named += [v for v in resolved.settings.options.values() if isinstance(v, str) and v]
    found: dict[str, str] = {}
    for text in named:
        path = Path(text).expanduser()
        try:
            if path.is_file():
                with path.open("rb") as f:
                    digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
            elif path.is_dir() and text == source:
                inside = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
                digest = hashlib.sha256(json.dumps(inside).encode()).hexdigest()[:16]
            else:
                continue
        except (OSError, ValueError):  # no path after all, or one that cannot be read: the run will say so
            continue
        found[path.name] = found.get(path.name, "") + digest
    return found


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return str(getattr(thing, "__qualname__", type(thing).__qualname__))


# -------------------------------------------------------------------- records
def read_record(folder: Path) -> dict[str, Any]:
    """What the comparison noted about a run; empty if nothing (or nothing readable)."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note(folder: Path, **entries: Any) -> None:
    """Add entries to what the comparison notes about a run."""
    RunFolder(folder).write_json(RECORD, {**read_record(folder), **entries})


# -------------------------------------------------------------------- what is there
class Damaged(PoloptError):
    """A run folder that cannot be read as one."""


def inspect_run(folder: Path) -> State:
    """What lies in the folder of one of the library's runs. Raises `Damaged` saying which file and why."""
    if not folder.exists():
        return "absent"
    _json(folder / RECORD)
    summary = _json(folder / "summary.json")
    if not (folder / "config.yaml").exists():
        if RunFolder(folder).newest() is not None or summary is not None or read_metrics(folder, whole=False):
            raise Damaged("config.yaml is missing")
        return "absent"
    try:
        _config(folder)
    except CallError as error:
        raise Damaged(f"config.yaml cannot be read: {error}") from error
    done = summary is not None and summary.get("status") == "done"
    lines = read_metrics(folder, whole=done)
    if not done:
        return "partial"
    assert summary is not None
    updates = summary.get("updates")
    if updates and (not lines or lines[-1].get("update") != updates):
        last = lines[-1].get("update") if lines else "none"
        raise Damaged(f"metrics.jsonl ends at update {last}, summary.json says {updates}")
    return "finished"


def inspect_external(folder: Path) -> State:
    """What lies in the folder of an external program's run. Raises `Damaged` as `inspect_run`."""
    if not folder.exists():
        return "absent"
    record = _json(folder / RECORD)
    if record is None:
        if any(folder.iterdir()):
            raise Damaged("run.json is missing")
        return "absent"
    if record.get("status") != "done":
        return "partial"
    if not read_metrics(folder, whole=True):
        raise Damaged("metrics.jsonl is missing or empty")
    return "finished"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path.name} holds no object")
    return found


def read_metrics(folder: Path, *, whole: bool) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. The last one may be cut short unless the file is to be whole; others raise `Damaged`."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"metrics.jsonl cannot be read: {error}") from error
    lines = text.rstrip("\n").split("\n")  # splitlines would also split at separators that JSON allows inside a string
    found: list[dict[str, Any]] = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no object")
        except ValueError as error:
            if i == len(lines) - 1 and not whole:
                break
            raise Damaged(f"metrics.jsonl line {i + 1} cannot be read: {error}") from error
        found.append(value)
    return found


def set_aside(folder: Path, reason: str, word: str = "damaged") -> str:
    """Rename a run folder to `<run>.<word>-1` (or -2, ...), so that nothing is deleted; returns a sentence about it."""
    n = 1
    while (target := folder.with_name(f"{folder.name}.{word}-{n}")).exists():
        n += 1
    folder.rename(target)
    return f"{folder.parent.name}/{folder.name} was {word} ({reason}): moved to {target.name} and run anew"


__all__ = [
    "RECORD", "Damaged", "Identity", "State", "code_of", "data_of", "inspect_external", "inspect_run", "note", "read_metrics",
    "read_record", "set_aside",
]  # fmt: skip
