"""Remove the staging of batches that are published or given up."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from phasewise.errors import StagingError
from phasewise.project.config import Project
from phasewise.publishing.maintenance import list_tree
from phasewise.settings import Settings
from phasewise.staging.batch import list_batches
from phasewise.staging.manifest import batch_folder
from phasewise.staging.replication import forget_batch

#: A batch that is removed gets a name that no batch can have, first, so that a half-removed one is none.
_TRASH = ".removed-"


@dataclass(frozen=True, kw_only=True)
class StagingCleanup:
    #: Ids of the batches whose staging was removed, oldest first.
    removed: tuple[str, ...]
    #: Ids of those that stay: running, or still to be resumed.
    kept: tuple[str, ...]
    freed_bytes: int


def remove_finished_staging(project: Project, settings: Settings, *, keep: Collection[str]) -> StagingCleanup:
    """Remove the staging of batches that are published, or older than ``batch_retention_days`` and so given up.

    Never touches the batches in *keep* (those that run now), nor one that can still be resumed.

    Raises:
        StagingError: a folder cannot be removed.
    """
    now, retention = datetime.now(UTC), timedelta(days=settings.batch_retention_days)
    removed: list[str] = []
    kept: list[str] = []
    freed_bytes = _empty_trash(project.staging)
    for batch in list_batches(project):
        if batch.id in keep or not (batch.is_published or now - batch.created_at > retention):
            kept.append(batch.id)
        else:
            forget_batch(project, batch.id)
            freed_bytes += _remove_batch(batch_folder(project, batch.id))
            removed.append(batch.id)
    return StagingCleanup(removed=tuple(removed), kept=tuple(kept), freed_bytes=freed_bytes)


def _remove_batch(folder: Path) -> int:
    """Remove *folder*; return its bytes."""
    trash = folder.with_name(f"{_TRASH}{folder.name}")
    try:
        with suppress(FileNotFoundError):  # who fetches what is staged removes it too, once it is forgotten
            folder.rename(trash)
        return _remove_tree(trash) if trash.exists() else 0
    except OSError as exc:
        raise StagingError(
            f"The staging of batch {folder.name} cannot be removed: {exc.strerror}.",
            hint=f"Remove {exc.filename or folder} by hand.",
        ) from exc


def _empty_trash(staging: Path) -> int:
    """Finish what an earlier cleanup, killed in the middle, began to remove."""
    return sum(_remove_tree(folder) for folder in staging.glob(f"{_TRASH}*"))


def _remove_tree(folder: Path) -> int:
    size_bytes = sum(list_tree(folder).values())
    shutil.rmtree(folder)
    return size_bytes
