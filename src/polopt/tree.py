"""Checkpoint trees on disk: tensors in safetensors, everything else in JSON; loading runs no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polopt.errors import PoloptError

State = dict[str, Any]
_TENSORS, _TREE = "tensors.safetensors", "tree.json"


def save_tree(folder: Path, tree: State, meta: State) -> None:
    """Write `tree` as the folder `folder`, atomically: it appears whole or not at all, also after a kill or power cut.

    Leaves may be tensors, NumPy arrays, bool, int (of any size), float, str, bytes-free lists and None; dict keys are strings.
    Raises OSError (disk full) after removing what was written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    skeleton = strip(tree, "", tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    for stale in folder.parent.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in folder.parent.glob(".old-*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir()
        try:
            save_file(tensors, str(temporary / _TENSORS))
        except OSError:
            raise
        except Exception as error:  # safetensors reports I/O failures as its own error type
            raise OSError(28, f"{error}") from error
        size = (temporary / _TENSORS).stat().st_size
        (temporary / _TREE).write_text(json.dumps({"meta": {**meta, "bytes": size}, "tree": skeleton}))
        for name in (_TENSORS, _TREE):
            _sync(temporary / name)
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_tree(folder: Path) -> tuple[State, State]:
    """(tree, meta) of a folder written by `save_tree`; raises `PoloptError` naming the file that is damaged or missing."""
    from safetensors.torch import load_file

    path = folder / _TREE
    try:
        document = json.loads(path.read_text())
        meta, skeleton = document["meta"], document["tree"]
        path = folder / _TENSORS
        if path.stat().st_size != meta["bytes"]:
            raise ValueError(f"it has {path.stat().st_size} bytes, {meta['bytes']} were written")
        tensors = load_file(str(path))
        return fill(skeleton, tensors), meta
    except FileNotFoundError as error:
        raise PoloptError(f"checkpoint file {path} is missing") from error
    except Exception as error:
        raise PoloptError(f"checkpoint file {path} is damaged: {error}") from error


def strip(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree as JSON can hold it; copies of its tensors and arrays go into `tensors`. Raises `TypeError` for other things."""
    if isinstance(value, torch.Tensor):
        # a copy of its own: safetensors refuses storage that two tensors share
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path}
    if isinstance(value, np.ndarray):
        plain = value.astype(np.int64) if value.dtype == np.uint32 else value
        tensors[path] = torch.from_numpy(np.array(plain, copy=True))
        return {"$array": path, "dtype": value.dtype.str}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"checkpoint key {path}/{key!r} must be a string that does not start with '$'")
        return {k: strip(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strip(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint entry {path} is a {type(value).__name__}, which cannot be saved without code")


def fill(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that `strip` was given."""
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$array" in value:
            return tensors[value["$array"]].numpy().astype(np.dtype(value["dtype"]), copy=False)
        return {k: fill(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [fill(v, tensors) for v in value]
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
