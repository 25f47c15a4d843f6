"""Locks on files: one process holds one at a time, and it ends with that process, however that ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds between two attempts to get a lock that another process holds.
_RETRY_SECONDS = 0.05


class LockHeld(Exception):
    """Another process holds the lock; *holder* is what it has written about itself, or empty."""

    def __init__(self, path: Path, holder: str) -> None:
        self.holder = holder
        super().__init__(f"{path} is locked by {holder or 'another process'}")


@contextmanager
def lock_file(path: Path, *, holder: str = "", timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock of *path* while the block runs, and keep *holder* in the file, for those who find it locked.

    The file is created where it is missing, its folder too, and stays.

    Raises:
        LockHeld: another process, or another block of this one, still holds it after *timeout* seconds.
        OSError: the file cannot be made, or its file system cannot lock files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + timeout
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise LockHeld(path, file.read())
            time.sleep(_RETRY_SECONDS)
        file.truncate(0)
        file.write(holder)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, or EACCES from some file systems
        return False
    return True
