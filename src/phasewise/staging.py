"""Staging: what a batch has extracted and not yet published.

    staging/<batch>/batch.json                     the plan: which tables belong to the batch
    staging/<batch>/partitions.json                which of them are split, and into which parts
    staging/<batch>/lake.json                      what the lake had when the batch began
    staging/<batch>/<table>/<attempt>.parquet      rows; where the lake's files are on S3, they are there from the start
    staging/<batch>/<table>/manifest.json          written last; without it the folder counts for nothing
    staging/<batch>/published.json                 the snapshot that the batch became

Each table, or each part of one that is split, has a folder that is written by one process at a time (its lock), and
read only once its manifest is there, so that nothing half-written is ever taken for complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from phasewise.disk import explain_os_error
from phasewise.errors import NothingStaged, PhasewiseError, SourceUnavailable, StagingError
from phasewise.exchange import fetch_staging, remove_shared, write_shared, write_shared_once
from phasewise.extraction import find_key_table, read_rows
from phasewise.lake import open_session, read_parquet, use_one_thread
from phasewise.loads import (
    FULL_LOAD,
    LakeView,
    Load,
    drop_new_columns,
    find_mark,
    plan_load,
    read_lake,
    select_new_rows,
)
from phasewise.partitions import (
    Partition,
    SplitTable,
    find_partition,
    name_item,
    read_splits,
    split_tables,
    write_splits,
)
from phasewise.project import Project
from phasewise.settings import Settings
from phasewise.sources import (
    Column,
    SnapshotToken,
    Source,
    describe_project_table,
    find_moment,
    open_source,
)
from phasewise.storage import FILE_PREFIX, StoredFile, create_storage_secret, is_stored, list_stored

#: Layout of manifest.json; a manifest of another version is extracted again.
MANIFEST_VERSION = 1

_MANIFEST = "manifest.json"
_PLAN = "batch.json"
_PUBLISHED = "published.json"
_GIVEN_UP = "given_up.json"
_SNAPSHOT = "snapshot.json"
_LAKE = "lake.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was extracted of one table."""

    batch: str
    table: str
    #: Which part of the table it is of; None: of the whole.
    partition: str | None = None
    #: Rows of the whole table, as the source counted them when it was split.
    table_rows: int | None = None
    rows: int
    #: Of the files on disk, compressed.
    size_bytes: int
    #: What the source itself counted at the moment of the scan.
    source_rows: int
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    #: Names relative to the manifest's folder, or URLs on S3.
    files: tuple[str, ...]
    started_at: datetime
    ended_at: datetime
    #: URL of the source, without its password.
    source: str
    #: The moment of the source, where it was held for several tables: those with the same are consistent with one
    #: another. None: the table is consistent for itself alone.
    snapshot: str | None = None
    #: Why the table is consistent for itself alone, where the source or the setting has a reason.
    snapshot_note: str | None = None
    #: Why the table was staged whole, where it may have more rows than its limit and could not be split.
    split_note: str | None = None
    #: Which rows were read, and what the publishing does with them.
    load: Load = FULL_LOAD
    #: Files with all keys of the source, where deleted rows are found by them.
    key_files: tuple[str, ...] = ()
    version: int = MANIFEST_VERSION

    @property
    def seconds(self) -> float:
        return (self.ended_at - self.started_at).total_seconds()

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=datetime.isoformat, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises: ValueError, KeyError or TypeError when *text* is no manifest of this version."""
        data: dict[str, Any] = json.loads(text)
        if data["version"] != MANIFEST_VERSION:
            raise ValueError(f"manifest version {data['version']}")
        data["columns"] = tuple(Column(**column) for column in data["columns"])
        data["key"], data["files"] = tuple(data["key"]), tuple(data["files"])
        data["key_files"] = tuple(data.get("key_files", ()))
        data["load"] = Load.from_json(data["load"]) if "load" in data else FULL_LOAD
        data["started_at"] = datetime.fromisoformat(data["started_at"])
        data["ended_at"] = datetime.fromisoformat(data["ended_at"])
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a batch is to contain; fixed when it begins, so that a retried batch means the same."""

    batch: str
    tables: tuple[str, ...]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The state of one batch in staging."""

    id: str
    created_at: datetime
    #: Tables with a complete manifest, in name order.
    tables: tuple[str, ...]
    #: Planned tables that are neither staged nor given up.
    missing: tuple[str, ...]
    #: The snapshot that it became; None while it is unpublished.
    snapshot: int | None

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
    try:
        project.staging.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"phasewise")
        probe.unlink()
    except OSError as exc:
        raise explain_os_error(project.staging, exc) from exc
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
    folder = _batch_folder(project, batch)
    plan = BatchPlan(batch=batch, tables=tuple(tables), created_at=datetime.now(UTC))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_shared_once(project, folder / _PLAN, json.dumps(asdict(plan), default=datetime.isoformat))
    except OSError as exc:
        raise explain_os_error(folder, exc) from exc
    stored = read_plan(project, batch)
    assert stored is not None  # it was written just now, or before
    return stored


def read_plan(project: Project, batch: str) -> BatchPlan | None:
    """Return the plan of *batch*, None when it has not begun.

    Raises:
        StagingError: it is damaged.
    """
    path = _batch_folder(project, batch) / _PLAN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return BatchPlan(
            batch=data["batch"],
            tables=tuple(data["tables"]),
            created_at=datetime.fromisoformat(data["created_at"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StagingError(f"{path} is damaged.", hint=f"Remove {path.parent} and start a new batch.") from exc


def remember_lake(project: Project, settings: Settings, batch: str) -> LakeView:
    """Write down what the lake has when *batch* begins, once; what is read of each table follows from it.

    Raises:
        LakeError: there is a lake, and it cannot be read.
        StagingError: staging cannot be written, or what was written cannot be read.
    """
    path = _batch_folder(project, batch) / _LAKE
    try:
        if not path.exists():
            write_shared_once(project, path, read_lake(project, settings).to_json())
        return LakeView.from_json(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise explain_os_error(path.parent, exc) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise StagingError(f"{path} is damaged.", hint=f"Remove {path.parent} and start a new batch.") from exc


def give_up_tables(project: Project, batch: str, reasons: Mapping[str, str]) -> None:
    """Write down that the tables of *reasons* failed within the failure budget: the batch is published without them.

    Raises:
        StagingError: staging cannot be written.
    """
    folder = _batch_folder(project, batch)
    try:
        write_shared(project, folder / _GIVEN_UP, json.dumps(dict(reasons)))
    except OSError as exc:
        raise explain_os_error(folder, exc) from exc


def read_given_up(project: Project, batch: str) -> dict[str, str]:
    """Return table → reason for the tables that *batch* is published without; not those staged since."""
    try:
        reasons: dict[str, str] = json.loads((_batch_folder(project, batch) / _GIVEN_UP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    staged = {manifest.table for manifest in _list_manifests(project, batch)}
    return {table: reason for table, reason in reasons.items() if table not in staged}


def plan_partitions(
    project: Project, settings: Settings, batch: str, snapshot: SnapshotToken | None
) -> dict[str, SplitTable]:
    """Decide which tables of *batch* are staged in parts, and write it down; return table → its parts.

    A table that could not be split is among them too, without parts and with the reason.

    Of a table with a cursor the new rows alone are read, and they are staged whole.
    What was decided at the same moment of the source, or is staged completely, stays. A table that was staged in
    part at another moment is divided anew, and its parts from then are removed.

    Raises:
        SourceUnavailable: the source does not answer.
        StagingError: staging cannot be written.
    """
    folder = _batch_folder(project, batch)
    plan = read_plan(project, batch)
    before = read_splits(folder)
    moment = snapshot["id"] if snapshot else None
    staged = {manifest.table for manifest in list_manifests(project, batch)}
    kept = {table: split for table, split in before.items() if table in staged or split.moment == moment}
    open_tables = [table for table in (plan.tables if plan else ()) if table not in {*kept, *staged}]
    whole = {
        table: replace(before[table], partitions=(), moment=moment, note=None)
        for table in open_tables
        if table in before
    }
    view = remember_lake(project, settings, batch)
    # One for all tables: some read their whole catalogue to describe one.
    source = open_source(project, settings)
    large = [table for table in open_tables if _reads_all(project, source, table, view)]
    splits = {**before, **whole, **split_tables(project, settings, large, snapshot, before=before)}
    try:
        if splits != before:
            write_splits(project, folder, splits)
        for item in (name_item(table, name) for table in whole for name in before[table].list_names()):
            remove_shared(project, folder / _folder_name(item))
    except OSError as exc:
        raise explain_os_error(folder, exc) from exc
    return {table: split for table, split in splits.items() if split.partitions or split.note}


def _reads_all(project: Project, source: Source, table: str, view: LakeView) -> bool:
    contract = project.find_table(table)
    if contract.cursor is None:
        return True
    try:
        described = describe_project_table(project, source, table)
        return plan_load(contract, described, view.find(table)).reads_all
    except PhasewiseError:
        return False  # its own flow run says what is wrong with it


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
    folder = _batch_folder(project, batch)
    with open_source(project, settings).open_snapshot(folder / ".source") as held:
        # A source that found an earlier moment again says when that was.
        token = {"taken_at": datetime.now(UTC).isoformat(), **held} if held is not None else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_shared(project, folder / _SNAPSHOT, json.dumps(token))
        except OSError as exc:
            raise explain_os_error(folder, exc) from exc
        try:
            yield token
        finally:
            remove_shared(project, folder / _SNAPSHOT)


def _check_age(token: SnapshotToken, settings: Settings, source: Source) -> None:
    hours = (datetime.now(UTC) - datetime.fromisoformat(token["taken_at"])).total_seconds() / 3600
    if hours > settings.source_snapshot_hours:
        raise SourceUnavailable(
            f"The moment of {source.url} that the batch holds is {hours:.1f} hours old.",
            hint="Start a new batch, or raise PHASEWISE_SOURCE_SNAPSHOT_HOURS.",
        )


def forget_snapshot(project: Project, batch: str) -> None:
    """Drop the moment that ``open_snapshot`` kept for a resume: the source must be mended, so it is read anew."""
    shutil.rmtree(_batch_folder(project, batch) / ".source", ignore_errors=True)


def _read_token(folder: Path) -> SnapshotToken | None:
    try:
        token: SnapshotToken | None = json.loads((folder / _SNAPSHOT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return token


def extract_table(
    project: Project,
    settings: Settings,
    *,
    batch: str,
    table: str,
    partition: str | None = None,
    snapshot: SnapshotToken | None = None,
) -> Manifest:
    """Extract one table of the source, or one part of it, into staging, as zstd Parquet, in bounded memory.

    Rows and the source's own count are of one moment: that of *snapshot*, else the one that ``open_snapshot`` holds
    for the batch, else that of a transaction of their own.
    Of a table with a cursor only the rows beyond the last one are read, as the lake knew it when the batch began.
    What is already staged for *batch* is not extracted again: its manifest is returned.

    Raises:
        SourceUnavailable: the source does not answer.
        TableMissing: the source lacks the table.
        SchemaDrift: the table does not fit its contract.
        UnfaithfulValue: a value would change; the message names column, sample row and the option that decides.
        StagingError: staging cannot be written, another process is extracting the same, or the table is not split so.
    """
    item = name_item(table, partition)
    folder = _batch_folder(project, batch) / _folder_name(item)
    fetch_staging(project, batch, folder=folder.name)
    if read_plan(project, batch) is None:
        begin_batch(project, batch, [table])
    snapshot, note = find_moment(snapshot or _read_token(folder.parent), table)
    split = read_splits(folder.parent).get(table)
    if partition is not None and note and split is not None and split.moment is not None:
        raise StagingError(
            f'Table "{table}" is split, and its parts must be of one moment: {note}.',
            hint=f'Do not split it: [table."{table}"] partition_rows = 0.',
        )
    part = find_partition(split, table, partition, snapshot)
    with _hold_folder(folder, item):
        staged = _read_complete(folder)
        if staged is not None:
            return staged
        _remove_leftovers(folder)
        view = remember_lake(project, settings, batch)
        return _extract(project, settings, folder, batch, table, snapshot, part, split, note, view)


def read_manifest(project: Project, batch: str, table: str, partition: str | None = None) -> Manifest:
    """Return the manifest of a staged table, or of a part of it.

    Raises:
        NothingStaged: the table is not staged, or not completely.
    """
    folder = _batch_folder(project, batch) / _folder_name(name_item(table, partition))
    fetch_staging(project, batch, folder=folder.name)
    manifest = _read_complete(folder)
    if manifest is None:
        raise NothingStaged(f'Table "{table}" is not staged in batch {batch}.', hint="Extract it first.")
    return manifest


def list_manifests(project: Project, batch: str) -> list[Manifest]:
    """Return the manifests of the tables that are staged completely, with all of their parts, in name order."""
    fetch_staging(project, batch)
    return _list_manifests(project, batch)


def _list_manifests(project: Project, batch: str) -> list[Manifest]:
    folder = _batch_folder(project, batch)
    found = _read_manifests(folder)
    staged = {(manifest.table, manifest.partition): manifest for manifest in found}
    splits = read_splits(folder)
    complete: list[Manifest] = []
    for table in sorted({manifest.table for manifest in found}):
        wanted = splits[table].list_names() if table in splits else [None]
        if all((table, name) in staged for name in wanted):
            complete += [staged[table, name] for name in wanted]
    return complete


def list_files(project: Project, batch: str) -> set[Path | StoredFile]:
    """Return the Parquet files of all that is staged of *batch*, also of tables of which some parts are missing."""
    fetch_staging(project, batch)
    return {
        file
        for manifest in _read_manifests(_batch_folder(project, batch))
        for file in (*staged_files(project, manifest), *staged_key_files(project, manifest))
    }


def _read_manifests(folder: Path) -> list[Manifest]:
    if not folder.is_dir():
        return []
    return [manifest for entry in folder.iterdir() if (manifest := _read_complete(entry)) is not None]


def list_batches(project: Project) -> list[Batch]:
    """Return the batches in staging, oldest first; a folder without a readable plan is none."""
    fetch_staging(project)
    if not project.staging.is_dir():
        return []
    found = [batch for entry in project.staging.iterdir() if (batch := _read_batch(project, entry)) is not None]
    return sorted(found, key=lambda batch: (batch.created_at, batch.id))


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
    folder = _batch_folder(project, batch)
    marker = json.dumps({"snapshot": snapshot, "at": datetime.now(UTC).isoformat()})
    try:
        write_shared(project, folder / _PUBLISHED, marker)
    except OSError as exc:
        raise explain_os_error(folder, exc) from exc


def staged_files(project: Project, manifest: Manifest) -> list[Path | StoredFile]:
    """Return the Parquet files of a staged table, or of a part of it."""
    folder = _batch_folder(project, manifest.batch) / _folder_name(name_item(manifest.table, manifest.partition))
    return [StoredFile(name) if is_stored(name) else folder / name for name in manifest.files]


def advise_again(file: Path | StoredFile) -> str:
    """Return what to do where a staged *file* is missing or damaged."""
    if isinstance(file, Path):
        return f"Remove {file.parent} and resume the batch: the table is extracted again."
    return "Start a new batch."  # the manifest is elsewhere, perhaps on several machines


def _name_in_manifest(file: Path | StoredFile) -> str:
    return file.name if isinstance(file, Path) else file.url


def measure_file(connection: duckdb.DuckDBPyConnection, file: Path | StoredFile) -> int | None:
    """Return the bytes of a staged file; None when it is not there."""
    if isinstance(file, Path):
        return file.stat().st_size if file.is_file() else None
    listed = list_stored(connection, f"{file}*").get(file)
    return listed.size_bytes if listed else None


def staged_key_files(project: Project, manifest: Manifest) -> list[Path | StoredFile]:
    """Return the Parquet files with the keys of the source; none where deleted rows need none."""
    folder = _batch_folder(project, manifest.batch) / _folder_name(name_item(manifest.table, manifest.partition))
    return [StoredFile(name) if is_stored(name) else folder / name for name in manifest.key_files]


def name_manifest(manifest: Manifest) -> str:
    """Return the path of a manifest's file below the staging folder, which may have another name on each machine."""
    return f"{manifest.batch}/{_folder_name(name_item(manifest.table, manifest.partition))}/{_MANIFEST}"


def find_batch_folder(project: Project, batch: str) -> Path:
    """Return the folder of *batch*, which need not exist.

    Raises:
        StagingError: *batch* cannot be the name of a folder.
    """
    return _batch_folder(project, batch)


def _extract(
    project: Project,
    settings: Settings,
    folder: Path,
    batch: str,
    name: str,
    snapshot: SnapshotToken | None,
    part: Partition | None,
    split: SplitTable | None,
    snapshot_note: str | None,
    view: LakeView,
) -> Manifest:
    started_at = datetime.now(UTC)
    source = open_source(project, settings)
    if snapshot is not None:
        _check_age(snapshot, settings, source)
    path = _name_file(project, folder)
    keys_path = _name_file(project, folder, prefix="keys-")
    extensions = dict.fromkeys([*source.extensions, *(["httpfs"] if project.is_stored else [])])
    bounded = settings.model_copy(update={"memory_limit": settings.extract_memory_limit})
    with open_session(bounded, extensions=tuple(extensions)) as connection:
        if project.is_stored:
            create_storage_secret(connection)
        # Attached first, so that the table is described as it is in the snapshot.
        source.attach(connection, snapshot)
        whole = describe_project_table(project, source, name)
        load = plan_load(project.find_table(name), whole, view.find(name))
        whole = drop_new_columns(project.find_table(name), whole, view.find(name))
        if part is not None:
            whole = replace(whole, conditions=(*whole.conditions, part.condition))
            use_one_thread(connection)  # the parts are read beside one another
        table = select_new_rows(source, whole, load)
        keys = find_key_table(whole, load)
        rows, source_rows = read_rows(connection, source, table, path, snapshot, keys=keys, keys_path=keys_path)
        load = replace(load, until=find_mark(connection, load, table, read_parquet([path])))
        size_bytes = measure_file(connection, path) or 0
    manifest = Manifest(
        batch=batch,
        table=name,
        partition=part.name if part else None,
        table_rows=split.rows if part and split else None,
        rows=rows,
        size_bytes=size_bytes,
        source_rows=source_rows,
        columns=table.columns,
        key=table.key,
        files=(_name_in_manifest(path),),
        started_at=started_at,
        ended_at=datetime.now(UTC),
        source=source.url,
        snapshot=snapshot["id"] if snapshot else None,
        snapshot_note=snapshot_note,
        split_note=split.note if split else None,
        load=load,
        key_files=(_name_in_manifest(keys_path),) if keys else (),
    )
    try:
        write_shared(project, folder / _MANIFEST, manifest.to_json())
    except OSError as exc:
        raise explain_os_error(folder, exc) from exc
    return manifest


def _name_file(project: Project, folder: Path, *, prefix: str = "") -> Path | StoredFile:
    """Return where the rows of *folder*'s table go.

    On S3 that is where they stay, since nothing there can be linked: among the lake's files, under a name of their own.
    """
    name = f"{prefix}{uuid.uuid4().hex}.parquet"
    if project.is_stored:
        return StoredFile(f"{project.data_path}main/{folder.name}/{FILE_PREFIX}{name}")
    return folder / name


def _batch_folder(project: Project, batch: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", batch):
        raise StagingError(f'"{batch}" cannot be the id of a batch.', hint="Use letters, digits, - _ and dots.")
    return project.staging / batch


def _folder_name(table: str) -> str:
    """Return a folder name that is safe on every file system, different for different tables.

    A name of lower-case letters, digits and underscores is its own. Any other gets a digest, which also keeps
    apart what differs by case only, where file systems do not. The manifest holds the real name.
    """
    if re.fullmatch(r"[a-z0-9_]{1,80}", table):
        return table
    readable = re.sub(r"[^a-z0-9_]+", "-", table.lower())[:40].strip("-")
    return f"{readable}-{hashlib.sha256(table.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


@contextmanager
def _hold_folder(folder: Path, table: str) -> Iterator[None]:
    """Create the folder of *table* and be its one writer; the lock ends with this process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as exc:
        raise explain_os_error(folder, exc) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except OSError as exc:
        if exc.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise StagingError(
            f'Another process is extracting table "{table}" into {folder}.', hint="Wait for it, then try again."
        ) from exc
    finally:
        os.close(descriptor)


def _read_complete(folder: Path) -> Manifest | None:
    """Return the manifest in *folder* when all that it names is there in full; else None."""
    try:
        manifest = Manifest.from_json((folder / _MANIFEST).read_text(encoding="utf-8"))
        if any(is_stored(name) for name in manifest.files):
            return manifest  # they were there in full before it; publishing looks again
        size_bytes = sum((folder / name).stat().st_size for name in manifest.files)
        for name in manifest.key_files:
            (folder / name).stat()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if size_bytes == manifest.size_bytes else None


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != ".lock":
            entry.unlink(missing_ok=True)


def _read_batch(project: Project, folder: Path) -> Batch | None:
    try:
        plan = read_plan(project, folder.name)
        if plan is None:
            return None
        staged = sorted({manifest.table for manifest in _list_manifests(project, folder.name)})
    except StagingError:
        return None
    settled = {*staged, *read_given_up(project, folder.name)}
    return Batch(
        id=plan.batch,
        created_at=plan.created_at,
        tables=tuple(staged),
        missing=tuple(table for table in plan.tables if table not in settled),
        snapshot=_read_snapshot(folder),
    )


def _read_snapshot(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / _PUBLISHED).read_text(encoding="utf-8"))["snapshot"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
