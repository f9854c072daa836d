"""Where a comparison lies: a folder of its own, worked on by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polopt.errors import CallError
from polopt.evidence.compare.plan import Asked, default_name
from polopt.evidence.compare.read import PLAN
from polopt.evidence.compare.worker import GRACE


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
def alone(folder: Path) -> Iterator[int]:
    """Refuse a second process that works on the same comparison; gives the lock's handle, which the worker is to hold as well.

    Where the process that took the lock was killed, its runs may still be saving: they are waited for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CallError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        end = time.monotonic() + GRACE + 5
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if _lives(os.pread(handle, 32, 0)) or time.monotonic() > end:
                    raise CallError(f"another process is comparing in {folder}; wait for it, or give another --out") from None
                time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk: the first run will say so
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _lives(text: bytes) -> bool:
    """Whether the process that took a lock lives; yes where it cannot be told."""
    try:
        os.kill(int(text), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


__all__ = ["alone", "folder_of"]
