"""Locks that a killed process cannot leave behind: several processes share the runs of one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None


def several_processes() -> bool:
    """Whether this system has the locks that several processes need."""
    return fcntl is not None


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock for the block, if no other process does; yields whether it is held.

    The operating system lets go of it when the process ends, however it ends. On a network file system it needs one
    that carries `flock` to other machines (NFS does, since Linux 2.6.12).

    Args:
        path: of the lock's file; it stays, empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        if fcntl is None:
            yield True
            return
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)
