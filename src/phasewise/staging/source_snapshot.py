"""Hold one source snapshot for all processes of a batch, and find it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from phasewise.errors import SourceUnavailable
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.sources import SnapshotToken, Source, open_source
from phasewise.staging.manifest import batch_folder
from phasewise.staging.replication import explaining_writes, read_shared, remove_shared, write_shared

_SNAPSHOT = "snapshot.json"


@contextmanager
def open_snapshot(project: Project, settings: Settings, batch: str) -> Iterator[SnapshotToken | None]:
    """Hold one moment of the source for all processes that extract tables of *batch*.

    Yields a token, small and JSON-able; it is kept in the batch's folder, where ``extract_table`` finds it, so that
    a table which is run again under a resumed batch never enters a moment that is gone. None, or a token whose id is
    None, where the source cannot hold a moment: each table is then consistent for itself alone, and its manifest's
    ``snapshot`` is None. What is kept for the token lies in the batch's folder and goes when the block ends well; when
    it fails, a source that can keep its moment keeps it for the resume.

    Raises:
        SourceUnavailable: the source does not answer.
        StagingError: staging cannot be written.
    """
    folder = batch_folder(project, batch)
    with open_source(project, settings).open_snapshot(folder / ".source") as held:
        # A source that found an earlier moment again says when that was.
        token = {"taken_at": datetime.now(UTC).isoformat(), **held} if held is not None else None
        with explaining_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_shared(project, folder / _SNAPSHOT, json.dumps(token))
        try:
            yield token
        finally:
            remove_shared(project, folder / _SNAPSHOT)


def check_age(token: SnapshotToken, settings: Settings, source: Source) -> None:
    hours = (datetime.now(UTC) - datetime.fromisoformat(token["taken_at"])).total_seconds() / 3600
    if hours > settings.source_snapshot_hours:
        raise SourceUnavailable(
            f"The moment of {source.url} that the batch holds is {hours:.1f} hours old.",
            hint="Start a new batch, or raise PHASEWISE_SOURCE_SNAPSHOT_HOURS.",
        )


def forget_snapshot(project: Project, batch: str) -> None:
    """Drop the snapshot that ``open_snapshot`` kept for a resume: the source must be fixed, and is then read again."""
    shutil.rmtree(batch_folder(project, batch) / ".source", ignore_errors=True)


def read_token(folder: Path) -> SnapshotToken | None:
    return read_shared(folder / _SNAPSHOT, json.loads)
