"""Batches of many updates in one small file: each column in one piece, integers in as few bytes as they need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polopt.batch import Batch, Final
from polopt.errors import CallError

WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = {str(d): d for d in (*WHOLE, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def pack(batches: Sequence[Mapping[str, Batch]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Columns of all batches, each as one flat tensor, and what is needed to cut them again."""
    columns: dict[str, dict[int, Tensor]] = {}
    numbers: dict[str, dict[int, Any]] = {}
    for u, named in enumerate(batches):
        for name, batch in named.items():
            ends = {} if batch.final is None else {"final": {"at": batch.final.at, "obs": batch.final.obs}}
            for path, leaf in _leaves({**batch.tree(), **ends}, f"batch/{name}"):
                (columns if isinstance(leaf, Tensor) else numbers).setdefault(path, {})[u] = leaf
    n = len(batches)
    tensors = {path: _narrow(torch.cat([x.detach().cpu().reshape(-1) for x in found.values()])) for path, found in columns.items()}
    about = {
        "updates": n,
        "columns": {
            path: {
                "dtype": str(next(iter(found.values())).dtype),
                **_repeated("shape", {u: list(x.shape) for u, x in found.items()}, n),
            }
            for path, found in columns.items()
        },
        "numbers": {path: _repeated("value", found, n) for path, found in numbers.items()},
    }
    return tensors, about


def unpack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> list[dict[str, Batch]]:
    """The batches that `pack` was given."""
    trees: list[dict[str, Any]] = [{} for _ in range(about["updates"])]
    for path, entry in about["columns"].items():
        flat, offset = tensors[path], 0
        for u, shape in _each("shape", entry, about["updates"]):
            size = int(np.prod(shape))
            _put(trees[u], path, flat[offset : offset + size].to(DTYPES[entry["dtype"]]).view(shape))
            offset += size
    for path, entry in about["numbers"].items():
        for u, value in _each("value", entry, about["updates"]):
            _put(trees[u], path, value)
    return [{name: _batch(tree) for name, tree in found.get("batch", {}).items()} for found in trees]


def _batch(tree: dict[str, Any]) -> Batch:
    final = tree.pop("final", None)
    return replace(Batch.from_tree(tree), final=None if final is None else Final(final["at"], final["obs"]))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split("/")
    for key in above:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _repeated(word: str, found: Mapping[int, Any], n: int) -> dict[str, Any]:
    """One value where it is the same in all n updates, else a value for each update that has one."""
    values = list(found.values())
    same = len(found) == n and all(v == values[0] for v in values)
    return {word: values[0]} if same else {"at": {str(u): v for u, v in found.items()}}


def _each(word: str, entry: Mapping[str, Any], n: int) -> Iterator[tuple[int, Any]]:
    yield from ((int(u), v) for u, v in entry["at"].items()) if "at" in entry else ((u, entry[word]) for u in range(n))


def _narrow(x: Tensor) -> Tensor:
    if x.dtype not in WHOLE or not x.numel():
        return x
    low, high = int(x.min()), int(x.max())
    return x.to(next(d for d in WHOLE if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max))


# -------------------------------------------------------------------- files
def write(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """One safetensors file, atomically, with a JSON document in its header."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(save(dict(tensors), {"document": json.dumps(document, separators=(",", ":"))}))
    temporary.replace(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of a file. Raises `CallError` naming a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {})["document"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CallError(f"{path} is damaged: {error}; record it again") from error


__all__ = ["pack", "read", "unpack", "write"]
