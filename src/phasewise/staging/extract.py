"""Extract one table, or one part of it, into staging. Its manifest is written last."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from phasewise.errors import StagingError
from phasewise.lake.object_store import FILE_PREFIX, StoredFile, create_storage_secret
from phasewise.lake.session import open_session, read_parquet, use_one_thread
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.sources import SnapshotToken, describe_project_table, find_snapshot, open_source
from phasewise.staging.batch import begin_batch, read_plan, remember_lake
from phasewise.staging.extraction import find_key_table, read_rows
from phasewise.staging.load_plan import LakeView, drop_new_columns, find_mark, plan_load, select_new_rows
from phasewise.staging.manifest import (
    MANIFEST,
    Manifest,
    batch_folder,
    digest_file,
    folder_name,
    name_in_manifest,
    read_complete,
)
from phasewise.staging.partitions import Partition, SplitTable, find_partition, name_item, read_splits
from phasewise.staging.replication import explaining_writes, fetch_staging, write_shared
from phasewise.staging.source_snapshot import check_age, read_token
from phasewise.system.locks import LockHeld, lock_file


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
    folder = batch_folder(project, batch) / folder_name(item)
    fetch_staging(project, batch, folder=folder.name)
    if read_plan(project, batch) is None:
        begin_batch(project, batch, [table])
    snapshot, note = find_snapshot(snapshot or read_token(folder.parent), table)
    split = read_splits(folder.parent).get(table)
    if partition is not None and note and split is not None and split.moment is not None:
        raise StagingError(
            f'Table "{table}" is split, and its parts must be of one moment: {note}.',
            hint=f'Do not split it: [table."{table}"] partition_rows = 0.',
        )
    part = find_partition(split, table, partition, snapshot)
    with _hold_folder(folder, item):
        staged = read_complete(folder)
        if staged is not None:
            return staged
        _remove_leftovers(folder)
        view = remember_lake(project, settings, batch)
        return _extract(project, settings, folder, batch, table, snapshot, part, split, note, view)


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
        check_age(snapshot, settings, source)
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
            use_one_thread(connection)  # the parts are read at the same time
        table = select_new_rows(source, whole, load)
        keys = find_key_table(whole, load)
        rows, source_rows = read_rows(connection, source, table, path, snapshot, keys=keys, keys_path=keys_path)
        load = replace(load, until=find_mark(connection, load, table, read_parquet([path])))
        files = [path, keys_path] if keys else [path]
        digests = tuple(digest_file(connection, file) or "" for file in files)
    manifest = Manifest(
        batch=batch,
        table=name,
        partition=part.name if part else None,
        table_rows=split.rows if part and split else None,
        rows=rows,
        size_bytes=int(digests[0].partition("-")[0] or 0),
        source_rows=source_rows,
        columns=table.columns,
        key=table.key,
        files=(name_in_manifest(path),),
        started_at=started_at,
        ended_at=datetime.now(UTC),
        source=source.url,
        snapshot=snapshot["id"] if snapshot else None,
        snapshot_note=snapshot_note,
        split_note=split.note if split else None,
        load=load,
        key_files=tuple(map(name_in_manifest, files[1:])),
        digests=digests,
    )
    write_shared(project, folder / MANIFEST, manifest.to_json())
    return manifest


def _name_file(project: Project, folder: Path, *, prefix: str = "") -> Path | StoredFile:
    """Return where the rows of *folder*'s table go.

    On S3 that is where they stay, since nothing there can be linked: among the lake's files, under a name of their own.
    """
    name = f"{prefix}{uuid.uuid4().hex}.parquet"
    if project.is_stored:
        return StoredFile(f"{project.data_path}main/{folder.name}/{FILE_PREFIX}{name}")
    return folder / name


@contextmanager
def _hold_folder(folder: Path, table: str) -> Iterator[None]:
    """Create the folder of *table* and be its one writer; the lock ends with this process, however that ends."""
    with ExitStack() as held:
        try:
            with explaining_writes(folder):
                held.enter_context(lock_file(folder / ".lock"))
        except LockHeld as exc:
            raise StagingError(
                f'Another process is extracting table "{table}" into {folder}.', hint="Wait for it, then try again."
            ) from exc
        yield


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != ".lock":
            entry.unlink(missing_ok=True)
