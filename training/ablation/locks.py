"""Locks that a killed process cannot leave behind: several processes share the runs of one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock for the block, if no other process does; yields whether it is held.

    The operating system lets go of it when the process ends, however it ends. On a network file system it needs one
    that carries `flock` to other machines (NFS does, since Linux 2.6.12).

    Args:
        path: of the lock's file.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(path).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with held:
        yield True
