"""Errors of writes to staging that the system refused, with the free bytes and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

from phasewise.errors import StagingError


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
