"""From names and dotted settings to a checked run: user over task preset over defaults, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from polopt.errors import CallError
from polopt.method import Method
from polopt.paths import Leaf, Slot, canonical, coerce, find, method_leaves, replace_at, settings_leaves, type_text
from polopt.registry import get_method
from polopt.settings import Settings

if TYPE_CHECKING:
    from polopt.interfaces import Task

Origin = Literal["default", "task", "user"]
Layer = tuple[Mapping[str, Any], Mapping[str, str] | str]  # values by path, and where they were given


@dataclass(frozen=True)
class Resolved:
    """A run, ready to start: what was asked for, with every value filled in.

    origin says for each canonical path whether its value is the library's default, the task's preset or the user's. base is
    the method before any override; sources says for the user's paths where they were given.
    """

    method: Method
    task: Task
    settings: Settings
    origin: Mapping[str, Origin] = field(default_factory=dict)
    base: Method | None = None
    base_name: str = ""  # as given: "grpo" or "my_file.py:MINE"; empty for a Method value
    given: Mapping[str, Any] = field(default_factory=dict)  # the user's values by canonical path, as given
    defaults: Mapping[str, Any] = field(default_factory=dict)  # by canonical path: what the value is without user and preset

    def leaves(self) -> dict[str, Leaf]:
        """Everything that can be set, with its present value."""
        return settings_leaves(self.settings) | method_leaves(self.method)


@dataclass(frozen=True)
class Field:
    """A setting as shown by `--help` and `--dry-run`."""

    path: str
    type: str
    default: Any
    current: Any
    range: str
    help: str
    origin: str
    group: str


def apply_override(method: Method, path: str, value: Any, source: str = "") -> Method:
    """`method` with one slot or setting changed; `path` may be a shorthand (`lr`, `group_size`, `penalty.coef`).

    Raises `CallError` naming path, value, `source`, and what would have been valid.
    """
    leaf = find(path, method, Settings(), source)
    if _is_setting(leaf.path):
        raise CallError(f"'{path}' is a setting of the run, not of the method {method.name}")
    return _put(method, leaf, value, source, path)


def _put(method: Method, leaf: Leaf, value: Any, source: str, path: str) -> Method:
    made = coerce(leaf, value, source, path)
    try:
        return replace_at(method, leaf.path.split("."), made)
    except CallError as error:
        raise CallError(f"{path} = {value!r} ({source}): {error}" if source else f"{path} = {value!r}: {error}") from error


def resolve(
    method: str | Method,
    task: str | Task,
    user: Mapping[str, Any] | Sequence[Layer] | None = None,
    *,
    sources: Mapping[str, str] | str = "",
    name: str | None = None,
) -> Resolved:
    """Fill in every value of a run: the user's, else the task's preset, else the default; then check that it can work.

    user: values by dotted path or nested mappings, or several layers of these with their sources, of which later ones win.
    sources: where the values were given (one text, or one by path), for messages. name: what to call the method.
    Raises `CallError` for unknown names, wrong types, values out of range, and parts that cannot work together or with the task.
    """
    base = get_method(method) if isinstance(method, str) else method
    if not isinstance(base, Method):
        raise CallError(f"method must be a name or a Method, got {type(base).__name__}")
    layers = _layers(user, sources)
    chosen, wanted = _gather(base, layers)
    options = {w.path.partition(".")[2]: w for w in wanted.values() if w.path.startswith("options.")}
    made = _make_task(task, {k: coerce(Leaf(w.path, Any, None), w.value) for k, w in options.items()})

    check = getattr(made, "check", None)  # a quick look that loads no environment, model or data
    if check is not None:
        check()

    def said(method: Method) -> dict[str, _Wanted]:
        found = {canonical(p, method): (p, v) for p, v in made.preset(method).items()}
        mine = [w.path for w in wanted.values() if w.slot]
        return {
            full: _Wanted(full, given, value, f"preset of {made.name}", _slot_leaf(given, method) is not None)
            for full, (given, value) in found.items()
            if full not in wanted and not any(full.startswith(f"{slot}.") for slot in mine)
        }

    for preset in said(chosen).values():
        if preset.slot:
            chosen = _put(chosen, find(preset.path, chosen, Settings()), preset.value, preset.source, preset.given)
    start, settings = chosen, Settings()
    for w in wanted.values():
        chosen, settings = _set(chosen, settings, w)
    presets = {full: w for full, w in said(chosen).items() if not _inapplicable(full, chosen)}
    for w in presets.values():
        chosen, settings = _set(chosen, settings, w)

    after = settings_leaves(settings) | method_leaves(chosen)
    origin = {path: _origin(path, wanted, presets) for path in after}
    defaults = {p: leaf.value for p, leaf in (settings_leaves(Settings()) | method_leaves(start) | _slots_of(base)).items()}
    given = {w.path: w.value for w in wanted.values()}
    base_name = method if isinstance(method, str) and ".py:" in method else base.name if isinstance(method, str) else ""
    found = Resolved(replace(chosen, name=name or chosen.name), made, settings, origin, base, base_name, given, defaults)
    refuse(found, {w.path: w.source for w in wanted.values()})
    return found


@dataclass(frozen=True)
class _Wanted:
    """A value that somebody asked for: canonical path, path as given, value, where it was given, whether it names parts."""

    path: str
    given: str
    value: Any
    source: str
    slot: bool


def _layers(user: Mapping[str, Any] | Sequence[Layer] | None, sources: Mapping[str, str] | str) -> list[Layer]:
    many = [(user or {}, sources)] if user is None or isinstance(user, Mapping) else list(user)
    return [(flatten(values), where) for values, where in many]


def _gather(base: Method, layers: Sequence[Layer]) -> tuple[Method, dict[str, _Wanted]]:
    """The method with the parts asked for, and what else is asked for, by canonical path; later layers win.

    Settings of a part that a later layer replaces are dropped with it.
    """
    chosen, wanted = base, dict[str, _Wanted]()
    settings = {f.name for f in fields(Settings)} | {"task"}
    for values, sources in layers:
        here: dict[str, _Wanted] = {}

        def add(path: str, leaf: Leaf, source: str, here: dict[str, _Wanted] = here, values: Mapping[str, Any] = values) -> None:
            if leaf.path in here:
                first = here[leaf.path].given
                raise CallError(f"'{path}' and '{first}' both set {leaf.path}" + (f" ({source})" if source else ""))
            here[leaf.path] = _Wanted(leaf.path, path, values[path], source, isinstance(leaf.type, Slot))

        source = {p: sources if isinstance(sources, str) else sources.get(p, "") for p in values}
        fields_later = []
        for path in sorted(values, key=lambda p: p.count(".")):  # parts first: their settings are checked against them
            leaf = None if path.partition(".")[0] in settings else _slot_leaf(path, chosen)
            if leaf is None:
                fields_later.append(path)
                continue
            add(path, leaf, source[path])
            chosen = _put(chosen, leaf, values[path], source[path], path)
            wanted = {full: w for full, w in wanted.items() if not full.startswith(f"{leaf.path}.")}
        for path in fields_later:
            add(path, find(path, chosen, Settings(), source[path]), source[path])
        wanted |= here
    return chosen, wanted


def _slots_of(method: Method) -> dict[str, Leaf]:
    return {p: leaf for p, leaf in method_leaves(method).items() if isinstance(leaf.type, Slot)}


def _set(method: Method, settings: Settings, wanted: _Wanted) -> tuple[Method, Settings]:
    """Set a value that names no parts (those are in place already)."""
    if wanted.slot:
        return method, settings
    leaf = find(wanted.path, method, settings, wanted.source)
    if not _is_setting(leaf.path):
        return _put(method, leaf, wanted.value, wanted.source, wanted.given), settings
    made = coerce(leaf, wanted.value, wanted.source, wanted.given)
    return method, replace_at(settings, leaf.path.split("."), made)


def _is_setting(path: str) -> bool:
    return path.partition(".")[0] in {f.name for f in fields(Settings)}


def _slot_leaf(path: str, method: Method) -> Leaf | None:
    """The leaf of a path that names a slot, or None."""
    if _is_setting(path):
        return None
    try:
        leaf = find(path, method, Settings())
    except CallError:
        return None
    return leaf if isinstance(leaf.type, Slot) else None


def _inapplicable(path: str, method: Method) -> bool:
    """A preset for a setting that only other parts have (the learning rate of a rule without one)."""
    return not _is_setting(path) and path not in method_leaves(method)


def _origin(path: str, given: Mapping[str, Any], preset: Mapping[str, Any]) -> Origin:
    """Where the value at `path` comes from; settings of a part come with it unless they were set themselves."""
    while path:
        if path in given:
            return "user"
        if path in preset:
            return "task"
        path = path.rpartition(".")[0]
    return "default"


def _make_task(task: str | Task, options: Mapping[str, Any]) -> Task:
    if isinstance(task, str):
        from polopt.tasks import make

        return make(task, options)
    if options:
        raise CallError(f"options.{next(iter(options))}: the task was given as an object, set its options there")
    return task


def refuse(resolved: Resolved, source: Mapping[str, str]) -> None:
    """Raise `CallError` for a combination that cannot work: parts, task, budget, device."""
    from polopt.run import Budget

    method, settings = resolved.method, resolved.settings
    where = f" ({source['budget']})" if source.get("budget") else ""
    try:
        Budget.parse(settings.budget)
    except CallError as error:
        raise CallError(f"{error}{where}") from None
    check_device(settings.device, source.get("device", ""))
    method.check()
    method.refuse_unless(resolved.task.offers, resolved.task.name)


def check_device(device: str, source: str = "") -> None:
    """Raise `CallError` if PyTorch does not know the device or the machine does not have it."""
    import torch

    where = f" ({source})" if source else ""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise CallError(f"device = '{device}'{where}: expected cpu, cuda or cuda:0")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise CallError(f"device = '{device}'{where}: this machine offers {torch.cuda.device_count()} CUDA devices; use cpu")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths; `part: NAME` inside a slot is the slot's own value; values of options stay whole."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}".replace("__", ".")
        if isinstance(value, Mapping) and not path.startswith(("options.", "task.")):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path.removesuffix(".part")] = value
    return flat


def schema(method: str | Method, task: str | Task, user: Mapping[str, Any] | None = None) -> list[Field]:
    """Everything that can be set for this method on this task, with types, ranges, defaults and help."""
    return fields_of(resolve(method, task, user))


def fields_of(resolved: Resolved) -> list[Field]:
    """The settings of a resolved run, in the order in which they are shown."""
    shown = []
    for path, leaf in resolved.leaves().items():
        if path.startswith("options."):
            continue
        group = path.split(".")[0] if "." in path or isinstance(leaf.type, Slot) else "run"
        if group == "updates":
            group = ".".join(path.split(".")[:2])
        shown.append(
            Field(
                path=path,
                type=type_text(leaf.type),
                default=resolved.defaults.get(path),
                current=leaf.value,
                range=str(leaf.range or ""),
                help=leaf.help,
                origin=resolved.origin.get(path, "default"),
                group=group,
            )
        )
    return shown


__all__ = ["Field", "Layer", "Resolved", "apply_override", "fields_of", "flatten", "refuse", "resolve", "schema"]
