"""`config.yaml`: a resolved run as text that repeats it, and reading such files with the line of every value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError
from polopt.method import Method
from polopt.overrides import Resolved
from polopt.part import _PARTS, Part
from polopt.paths import Slot, method_leaves
from polopt.registry import all_methods

if TYPE_CHECKING:
    from polopt.run import RunFolder

#: Keys of a configuration file that are no settings.
HEADER = ("method", "task", "name")
FROM = {"task": "preset of the task", "user": "set by the user"}


@dataclass(frozen=True)
class Config:
    """A configuration file: method and task as written, values by dotted path, and the line each came from."""

    method: str | None = None
    task: str | None = None
    name: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def only(self, *, method: bool = True, task: bool = True) -> Config:
        """What a file can rebuild: parts and rewards that were made in Python are refused.

        method, task: False if the caller has the object itself; its nameless parts, or all options of the task, are then left out.
        """
        own = {k: v for k, v in self.values.items() if task or not k.startswith("options.")}
        for path, text in [(k, t) for k, v in own.items() if (t := _nameless(v))]:
            what = "task" if path.startswith("options.") else "method"
            if what == "task" or method:
                raise CallError(
                    f"{path} = {text} ({self.sources[path]}) was made in Python and cannot be rebuilt from a file; "
                    f"pass the object again, e.g. polopt.resume(RUN, {what}=...), or keep it in a file of its own"
                )
            del own[path]
        return replace(self, values=own)


def _nameless(value: Any) -> str | None:
    """The `<name>` that stands for an object without a place in a file, if there is one in `value`."""
    many = value if isinstance(value, list) else [value]
    texts = [v.get("part") if isinstance(v, dict) else v for v in many]
    return next((t for t in texts if isinstance(t, str) and t.startswith("<") and t.endswith(">")), None)


# -------------------------------------------------------------------- writing
def dump_config(resolved: Resolved, place: Callable[[str], str] | None = None) -> str:
    """The run as YAML: every value, with a remark where it is not the library's default.

    place: maps a reference to the user's code, `/path/file.py:NAME`, to what is written instead (a copy's path).
    """
    place = place or (lambda spec: spec)
    lines = [f"# polopt {version('polopt')}; repeat this run with: polopt train --config THIS_FILE"]
    base = base_of(resolved)
    lines.append(f"method: {_yaml(place(base) if '.py:' in base else base)}")
    if resolved.method.name != base.rpartition(":")[2]:
        lines.append(f"name: {_yaml(resolved.method.name)}")
    lines.append(f"task: {_yaml(_task_name(resolved, place))}")
    tree: dict[str, Any] = {}
    for path, leaf in resolved.leaves().items():
        if isinstance(leaf.type, Slot) and leaf.type.plural:
            _put(tree, path.split("."), _List(leaf.type.kind, leaf.value))
        elif isinstance(leaf.type, Slot):
            _put(tree, [*path.split("."), "part"], leaf.value)
        elif not _inside_plural(path, resolved):
            _put(tree, path.split("."), leaf.value)
    lines += _block(tree, "", "", resolved, place)
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _List:
    kind: str
    parts: tuple[Part, ...]


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _inside_plural(path: str, resolved: Resolved) -> bool:
    leaves = resolved.leaves()
    found = [
        leaves[".".join(path.split(".")[:n])] for n in range(1, path.count(".") + 1) if ".".join(path.split(".")[:n]) in leaves
    ]
    return any(isinstance(leaf.type, Slot) and leaf.type.plural for leaf in found)


def _block(tree: Mapping[str, Any], indent: str, prefix: str, resolved: Resolved, place: Callable[[str], str]) -> Iterator[str]:
    for key, value in tree.items():
        path = f"{prefix}{key}".removesuffix(".part")
        remark = _remark(path, resolved)
        if isinstance(value, Mapping) and set(value) == {"part"} and value["part"] is None:
            yield f"{indent}{key}: null{remark}"
        elif isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _block(value, indent + "  ", f"{prefix}{key}.", resolved, place)
        elif (
            isinstance(value, _List)
            and any(part_spec(value.kind, p) is None for p in value.parts)
            and _same_in_base(path, value.parts, resolved)
        ):
            yield f"{indent}# {key}: as in the method"
        elif isinstance(value, _List):
            yield f"{indent}{key}:{remark}" if value.parts else f"{indent}{key}: []{remark}"
            for part in value.parts:
                yield f"{indent}  - part: {_yaml(_spec_text(value.kind, part, place))}"
                for name, given in _settings_of(part):
                    yield f"{indent}    {name}: {_value(given, place)}"
        elif key == "part" and part_spec(_kind(path), value) is None and _same_in_base(path, value, resolved):
            continue  # the method brings it
        elif key == "part":
            yield f"{indent}part: {_yaml(_spec_text(_kind(path), value, place))}{remark}"
        else:
            yield f"{indent}{key}: {_value(value, place)}{remark}"


def _same_in_base(path: str, value: Any, resolved: Resolved) -> bool:
    """Whether the method that `method:` names holds the same part at `path`, so that it need not be named."""
    base = resolved.base if resolved.base_name else all_methods().get(base_of(resolved))
    leaf = method_leaves(base).get(path) if base else None
    return leaf is not None and (leaf.value == value if isinstance(value, tuple) else type(leaf.value) is type(value))


def _remark(path: str, resolved: Resolved) -> str:
    """Where a value comes from, unless it is a default or came with its part."""
    origin = resolved.origin.get(path, "default")
    return f"  # {FROM[origin]}" if origin == "task" or path in resolved.given else ""


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _settings_of(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in fields(part):
        value = getattr(part, f.name)
        if not f.init:
            continue
        if is_dataclass(value) and not isinstance(value, type):
            yield from _settings_of(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _value(value: Any, place: Callable[[str], str]) -> str:
    """A value as inline YAML; functions and classes of the user's files by reference."""
    if isinstance(value, list | tuple) and any(callable(v) for v in value):
        return _yaml([_reference(v, place) if callable(v) else v for v in value])
    if callable(value):
        return _yaml(_reference(value, place))
    if isinstance(value, str) and ".py:" in value:  # one reference, or several things separated by commas
        found = [place(absolute(v.strip())) if ".py:" in v else v.strip() for v in value.split(",")]
        return _yaml(found if len(found) > 1 else found[0])
    if isinstance(value, str) and value and ("/" in value or value.endswith((".jsonl", ".parquet"))) and Path(value).exists():
        return _yaml(str(Path(value).resolve()))
    return _yaml(value)


def _reference(thing: Any, place: Callable[[str], str]) -> str:
    spec = spec_of(thing)
    return place(spec) if spec else _unnamed(thing)


def _unnamed(thing: Any) -> str:
    return f"<{getattr(thing, '__name__', type(thing).__name__)}>"


def _yaml(value: Any) -> str:
    import yaml

    try:
        return yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()
    except yaml.YAMLError:
        return _yaml(f"<{type(value).__name__}>")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _task_name(resolved: Resolved, place: Callable[[str], str]) -> str:
    """The task's own name (data files with their full path: a run resumes from anywhere), or a reference to the user's file."""
    given = resolved.task_name
    return place(absolute(given)) if ".py:" in given else resolved.task.name


# -------------------------------------------------------------------- references to code
def absolute(spec: str) -> str:
    """`file.py:NAME` with the file's full path."""
    path, _, name = spec.rpartition(":")
    return f"{Path(path).expanduser().resolve()}:{name}"


def spec_of(thing: Any) -> str | None:
    """`/path/to/file.py:NAME` of a class or function of the user's own file; None for what a new process cannot find."""
    if getattr(thing, "__module__", "__main__") == "__main__" or "." in getattr(thing, "__qualname__", "."):
        return None
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:
        return None
    return f"{Path(file).resolve()}:{thing.__qualname__}" if file and Path(file).is_file() else None


def part_spec(kind: str, part: Part) -> str | None:
    """The name that builds a part of this class: its registered name, or a reference to the user's file."""
    cls = type(part)
    found = _PARTS.get(kind, {}).get(part.name)
    registered = found is cls or type(found) is cls
    own = cls.__module__.startswith("_polopt_user_") or cls.__module__ == "__main__"
    return part.name if registered and not own else spec_of(cls)


def _spec_text(kind: str, part: Part, place: Callable[[str], str]) -> str:
    spec = part_spec(kind, part) or _unnamed(type(part))
    return place(spec) if ".py:" in spec else spec


def base_of(resolved: Resolved) -> str:
    """What `method:` says: the name as given, or the nearest registered ancestor of a method made in Python."""
    if resolved.base_name:
        return absolute(resolved.base_name) if ".py:" in resolved.base_name else resolved.base_name
    base: Method | None = resolved.base or resolved.method
    known = all_methods()
    while base is not None:
        if known.get(base.name) == base:
            return base.name
        base = base.parent
    return (resolved.base or resolved.method).name


def save_config(resolved: Resolved, folder: RunFolder) -> None:
    """Write `config.yaml` into a run folder, with copies of the user's files that it refers to under `files/`."""
    copies: dict[Path, str] = {}

    def place(spec: str) -> str:
        path_text, _, name = spec.rpartition(":")
        path = Path(path_text)
        if path not in copies:
            taken = set(copies.values())
            new = path.name
            while new in taken:
                new = f"{Path(new).stem}_{len(copies)}.py"
            copies[path] = new
        return f"files/{copies[path]}:{name}"

    text = dump_config(resolved, place)
    if copies:
        (folder.path / "files").mkdir(exist_ok=True)
    for source, new in copies.items():
        if source.is_file():
            folder.write_text(f"files/{new}", source.read_text(encoding="utf-8"))
    folder.write_text("config.yaml", text)


# -------------------------------------------------------------------- reading
def load_config(path: Path | str) -> Config:
    """Read a configuration file; raises `CallError` with file and line for what is not a configuration."""
    import yaml

    path = Path(path).expanduser()
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise CallError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise CallError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        return Config()
    if not isinstance(node, yaml.MappingNode):
        raise CallError(f"{path}: expected 'setting: value' lines, got {type(node).__name__.removesuffix('Node').lower()}")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    _read(node, "", values, lines, path)
    head = {key: values.pop(key) for key in HEADER if key in values}
    for key, value in head.items():
        if not isinstance(value, str):
            raise CallError(f"{path} line {lines[key]}: {key} must be a name, got {value!r}")
    return Config(**head, values=values, sources={k: f"{path} line {lines[k]}" for k in values})


def _read(node: Any, prefix: str, values: dict[str, Any], lines: dict[str, int], file: Path) -> None:
    import yaml

    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        path = f"{prefix}{key_node.value}"
        if path in lines:
            raise CallError(f"{file} line {line}: '{path}' was already given in line {lines[path]}")
        if isinstance(value_node, yaml.MappingNode) and not prefix.startswith("options."):
            _read(value_node, f"{path}.", values, lines, file)
            continue
        try:
            value = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except yaml.YAMLError as error:
            raise CallError(f"{file} line {line}: {path}: {getattr(error, 'problem', None) or error}") from error
        path = path.removesuffix(".part")
        lines[path] = line
        values[path] = _rooted(value, file.parent)


def _rooted(value: Any, root: Path) -> Any:
    """References to files beside the configuration file, made independent of the working directory."""
    if isinstance(value, list):
        return [_rooted(v, root) for v in value]
    if isinstance(value, dict):
        return {k: _rooted(v, root) for k, v in value.items()}
    if isinstance(value, str) and ".py:" in value and not Path(value.rpartition(":")[0]).is_absolute():
        beside = root / value.rpartition(":")[0]
        return f"{beside.resolve()}:{value.rpartition(':')[2]}" if beside.is_file() else value
    return value


__all__ = ["Config", "dump_config", "load_config", "save_config"]
