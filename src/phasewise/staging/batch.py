"""A batch in staging: which tables it is to have, which it has given up, and what it became."""

from __future__ import annotations

import json
import secrets
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from phasewise.errors import StagingError
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.staging.load_plan import LakeView, read_lake
from phasewise.staging.manifest import Manifest, batch_folder, list_staged_manifests
from phasewise.staging.replication import explaining_writes, fetch_staging, read_shared, write_shared, write_shared_once

_PLAN = "batch.json"
_PUBLISHED = "published.json"
_GIVEN_UP = "given_up.json"
_LAKE = "lake.json"


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a batch is to contain; fixed when it begins, so that a retried batch means the same."""

    batch: str
    tables: tuple[str, ...]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch as it was read from staging, once: what comes later is no part of it."""

    id: str
    #: None where nobody began it.
    plan: BatchPlan | None
    #: Of the tables that are staged completely, with all of their parts, in name order.
    manifests: tuple[Manifest, ...] = ()
    #: Table → reason, for those that it is published without.
    given_up: Mapping[str, str] = field(default_factory=dict)
    #: The snapshot that it became; None while it is unpublished.
    snapshot: int | None = None

    @property
    def created_at(self) -> datetime:
        """When it began; now, where nothing is there that could say so."""
        began = (part.started_at for part in self.manifests)
        return self.plan.created_at if self.plan else min(began, default=datetime.now(UTC))

    @cached_property
    def by_table(self) -> dict[str, list[Manifest]]:
        """The manifests of each table that is staged, in name order, those of its parts in theirs."""
        ordered = sorted(self.manifests, key=lambda manifest: (manifest.table, manifest.partition or ""))
        return {table: list(parts) for table, parts in groupby(ordered, key=lambda manifest: manifest.table)}

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that are staged."""
        return tuple(self.by_table)

    @property
    def missing(self) -> tuple[str, ...]:
        """Planned tables that are neither staged nor given up."""
        planned = self.plan.tables if self.plan else ()
        return tuple(table for table in planned if table not in self.by_table and table not in self.given_up)

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def is_published(self) -> bool:
        return self.snapshot is not None


def new_batch_id() -> str:
    """Return an id for a batch that no ``main_etl`` run stands for: ``manual-<UTC time>-<4 hex>``."""
    return f"manual-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def prepare_staging(project: Project, settings: Settings) -> None:
    """Make sure that staging exists, can be written and has ``min_free_bytes`` free.

    Raises:
        StagingError: it has not; the message names the folder and the free bytes.
    """
    probe = project.staging / f".probe-{uuid.uuid4().hex}"
    with explaining_writes(project.staging):
        project.staging.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"phasewise")
        probe.unlink()
    free_bytes = shutil.disk_usage(project.staging).free
    if free_bytes < settings.min_free_bytes:
        raise StagingError(
            f"Staging {project.staging} has {free_bytes} bytes free, and a batch needs {settings.min_free_bytes}.",
            hint="Free disk space, or lower PHASEWISE_MIN_FREE_BYTES.",
        )


def begin_batch(project: Project, batch: str, tables: Sequence[str]) -> BatchPlan:
    """Write down that *batch* consists of *tables*, once; a batch that began before keeps its first plan.

    Raises:
        StagingError: staging cannot be written, or the stored plan cannot be read.
    """
    folder = batch_folder(project, batch)
    plan = BatchPlan(batch=batch, tables=tuple(tables), created_at=datetime.now(UTC))
    with explaining_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_shared_once(project, folder / _PLAN, json.dumps(asdict(plan), default=datetime.isoformat))
    stored = read_plan(project, batch)
    assert stored is not None  # it was written just now, or before
    return stored


def read_plan(project: Project, batch: str) -> BatchPlan | None:
    """Return the plan of *batch*, None when it has not begun.

    Raises:
        StagingError: it is damaged.
    """
    return read_shared(batch_folder(project, batch) / _PLAN, TypeAdapter(BatchPlan).validate_json)


def remember_lake(project: Project, settings: Settings, batch: str) -> LakeView:
    """Write down what the lake has when *batch* begins, once; what is read of each table follows from it.

    Raises:
        LakeError: there is a lake, and it cannot be read.
        StagingError: staging cannot be written, or what was written cannot be read.
    """
    path = batch_folder(project, batch) / _LAKE
    if not path.exists():
        write_shared_once(project, path, json.dumps(asdict(read_lake(project, settings))))
    view = read_shared(path, TypeAdapter(LakeView).validate_json)
    assert view is not None  # it was written just now, or before
    return view


def give_up_tables(project: Project, batch: str, reasons: Mapping[str, str]) -> None:
    """Write down that the tables of *reasons* failed within the failure budget: the batch is published without them.

    Raises:
        StagingError: staging cannot be written.
    """
    write_shared(project, batch_folder(project, batch) / _GIVEN_UP, json.dumps(dict(reasons)))


def read_batch(project: Project, batch: str) -> Batch:
    """Read what is staged of *batch*: its plan, each manifest and what was given up, all of them once.

    Raises:
        StagingError: its plan is damaged.
    """
    fetch_staging(project, batch)
    return _read_batch(project, batch)


def list_batches(project: Project) -> list[Batch]:
    """Return the batches in staging, oldest first; a folder without a readable plan is none."""
    fetch_staging(project)
    found: list[Batch] = []
    for entry in project.staging.iterdir() if project.staging.is_dir() else ():
        with suppress(StagingError):
            found.append(_read_batch(project, entry.name))
    return sorted((batch for batch in found if batch.plan), key=lambda batch: (batch.created_at, batch.id))


def find_publishable_batch(project: Project, *, since: datetime | None = None) -> str | None:
    """Return the newest batch that is staged completely and not published, None when there is none.

    A batch older than a published one does not count: publishing it would take the warehouse back in time. *since* is
    when the batch began that readers see, whose staging may be gone.
    """
    for batch in reversed(list_batches(project)):
        if batch.is_published or (since is not None and batch.created_at < since):
            return None
        if batch.is_complete:
            return batch.id
    return None


def mark_published(project: Project, batch: str, snapshot: int) -> None:
    """Write down which snapshot *batch* became.

    Raises:
        StagingError: staging cannot be written.
    """
    marker = json.dumps({"snapshot": snapshot, "at": datetime.now(UTC).isoformat()})
    write_shared(project, batch_folder(project, batch) / _PUBLISHED, marker)


def _read_batch(project: Project, batch: str) -> Batch:
    plan = read_plan(project, batch)
    manifests = tuple(list_staged_manifests(project, batch))
    staged = {manifest.table for manifest in manifests}
    folder = batch_folder(project, batch)
    return Batch(
        id=batch,
        plan=plan,
        manifests=manifests,
        # One that ended after all, before anybody looked, is part of the batch.
        given_up={table: why for table, why in _read_json(folder / _GIVEN_UP).items() if table not in staged},
        snapshot=_read_json(folder / _PUBLISHED).get("snapshot"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
