"""Errors of writes to staging that the system refused, with the free bytes and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phasewise.errors import StagingError


@contextmanager
def explaining_writes(folder: Path) -> Iterator[None]:
    """Raise StagingError, which names the free bytes, where the system refuses a write to *folder*."""
    try:
        yield
    except OSError as exc:
        raise explain_write(folder, exc.strerror or str(exc)) from exc


def explain_write(folder: Path, text: str) -> StagingError:
    """Return the error for a write to *folder* that failed with *text*; it names the free bytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    return StagingError(
        f"Staging {folder} cannot be written ({free_bytes} bytes free): {text.rstrip('.')}.",
        hint="Free disk space or make the folder writable, then resume: what is staged is kept.",
    )
