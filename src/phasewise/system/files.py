"""Files of staging that are written whole or not at all, and that survive a power cut."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from phasewise.errors import StagingError


def write_once(path: Path, text: str) -> None:
    """Write *path* unless it exists; of several writers at the same time one wins, whole."""
    fresh = _write_aside(path, text)
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    sync_path(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write *path* in one step: readers see what was there before, or all of *text*."""
    _write_aside(path, text).replace(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(folder: Path, exc: OSError) -> StagingError:
    """Return the error for a write to *folder* that the system refused; it names the free bytes."""
    return explain_write(folder, exc.strerror or str(exc))


def explain_write(folder: Path, text: str) -> StagingError:
    """Return the error for a write to *folder* that failed with *text*; it names the free bytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    return StagingError(
        f"Staging {folder} cannot be written ({free_bytes} bytes free): {text.rstrip('.')}.",
        hint="Free disk space or make the folder writable, then resume: what is staged is kept.",
    )


def _write_aside(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    fresh.write_text(text, encoding="utf-8")
    sync_path(fresh)
    return fresh
