"""Where a comparison lies: a folder of its own, worked on by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polopt.errors import CallError
from polopt.evidence.compare.plan import Asked, default_name
from polopt.evidence.compare.read import PLAN


def folder_of(asked: Asked, out: str | Path | None) -> Path:
    """The comparison's folder: a new one or one that holds a comparison."""

    def holds_other(path: Path) -> bool:
        return (
            path.exists() and not (path / PLAN).exists() and (not path.is_dir() or any(p.name != ".lock" for p in path.iterdir()))
        )

    if out is not None:
        path = Path(out).expanduser()
        if holds_other(path):
            raise CallError(f"--out {path} holds something that is no comparison; give a folder of its own")
        return path
    base = path = Path("runs") / default_name(asked)
    n = 1
    while holds_other(path):
        n += 1
        path = base.with_name(f"{base.name}-{n}")
    return path


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second process that works on the same comparison."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CallError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CallError(f"another process is comparing in {folder}; wait for it, or give another --out") from None
        yield
    finally:
        os.close(handle)


__all__ = ["alone", "folder_of"]
