"""Networks that were trained once and are read as they are: tensors by name, shipped with the library or in a user's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from polopt.errors import CallError, nearest

ASSETS = Path(__file__).parents[1] / "assets"


def shipped(kind: str) -> list[str]:
    """Names of the artefacts of a kind that come with the library (`assets/<kind>/<name>.safetensors`)."""
    return sorted(p.stem for p in (ASSETS / kind).glob("*.safetensors"))


def artefact(kind: str, name: str, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """The tensors of the artefact `name` (shipped), or of a file `path/to/it.safetensors`.

    shapes: what must be in it, None for any length. Raises `CallError` naming the file and what is wrong with it.
    """
    known = shipped(kind)
    path = Path(name).expanduser() if name.endswith(".safetensors") else ASSETS / kind / f"{name}.safetensors"
    if not path.is_file():
        hint = f"there is no file {path}" if name.endswith(".safetensors") else f"known: {', '.join(known)}{nearest(name, known)}"
        raise CallError(f"{kind} '{name}': {hint}; give one of them or a path that ends in .safetensors")
    found = _read(path)
    for key, shape in shapes.items():
        if key not in found:
            raise CallError(f"{path} lacks the tensor '{key}', it has {sorted(found)}")
        have = tuple(found[key].shape)
        if len(have) != len(shape) or any(b is not None and a != b for a, b in zip(have, shape, strict=True)):
            wanted = " x ".join("any" if n is None else str(n) for n in shape)
            raise CallError(f"{path}: '{key}' has shape {have}, expected {wanted}")
        if not bool(found[key].isfinite().all()):
            raise CallError(f"{path}: '{key}' holds numbers that are not finite")
    return {key: found[key].clone() for key in shapes}


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except Exception as error:
        raise CallError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors
