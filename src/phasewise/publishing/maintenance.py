"""Maintain the warehouse: expire old snapshots, merge small files, delete what no snapshot needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import duckdb

from phasewise.errors import LakeError
from phasewise.lake.object_store import FILE_PREFIX, File, StoredFile, list_stored
from phasewise.lake.postgres_catalog import find_schema
from phasewise.lake.publications import latest_publication, list_columns, list_tables
from phasewise.lake.queries import first_line
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.warehouse import Snapshot, has_lake, list_snapshots
from phasewise.project.config import Project
from phasewise.publishing.session import open_writer
from phasewise.settings import Settings
from phasewise.staging.batch import list_batches
from phasewise.staging.manifest import list_files

#: Files below this size are merged with their neighbours; what a full refresh registers is mostly larger, and is
#: replaced as a whole by the next batch, so that rewriting it would be for nothing.
MERGE_BELOW_BYTES = 4 * 1024 * 1024

#: A larger file is written again when this share of its rows was deleted.
REWRITE_SHARE = 0.2

#: A Parquet file that no snapshot knows may belong to a transaction of somebody else's that is still open.
ORPHAN_GRACE = timedelta(hours=1)

#: Ids on DuckLake's list of files to delete, for those that it never had: far beyond the ids that it gives.
_NO_DATA_FILE = 1 << 62


@dataclass(frozen=True, kw_only=True)
class LakeMaintenance:
    expired_snapshots: int = 0
    #: Files that took the place of several smaller ones.
    merged_files: int = 0
    deleted_files: int = 0
    freed_bytes: int = 0


def maintain_lake(project: Project, settings: Settings, *, orphan_grace: timedelta = ORPHAN_GRACE) -> LakeMaintenance:
    """Expire snapshots past retention, merge small files, and delete the files that nothing needs any more.

    Whoever began to read within the last ``snapshot_retention_days`` days can read to the end. Files that Phasewise
    put there and no snapshot knows are of a publish that failed, and go at once; those of others after *orphan_grace*.

    Raises:
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
        LakeError: the warehouse cannot be written.
    """
    if not has_lake(project):
        return LakeMaintenance()
    retention = timedelta(days=settings.snapshot_retention_days)
    try:
        with open_writer(project, settings) as session:
            connection = session.connection
            before = _list_data(connection, project)
            expired = _expire_snapshots(connection, retention)
            _delete_unneeded(connection, retention)
            merged = _merge_small_files(connection)
            if project.is_stored:
                _delete_stored_orphans(connection, project, before, orphan_grace)
            else:
                _delete_orphans(connection, before, orphan_grace)
            deleted = before.keys() - _list_data(connection, project).keys()
    except duckdb.Error as exc:
        raise LakeError(
            f"The warehouse {project.warehouse_name} could not be maintained: {first_line(exc)}",
            hint="What readers see is unchanged; the next cleanup continues where this one stopped.",
        ) from exc
    return LakeMaintenance(
        expired_snapshots=expired,
        merged_files=merged,
        deleted_files=len(deleted),
        freed_bytes=sum(before[file] for file in deleted),
    )


def list_expired(snapshots: Sequence[Snapshot], *, before: datetime) -> list[int]:
    """Return the ids of *snapshots*, oldest first, that nobody who began to read after *before* can be reading.

    What counts is when a snapshot was replaced, not when it was made: the one that stood for a month has readers
    until the moment of the next. The newest snapshot of a batch stays, since it says what is published.
    """
    newest = max((snapshot.id for snapshot in snapshots if snapshot.batch is not None), default=None)
    return [
        snapshot.id for snapshot, following in pairwise(snapshots) if following.at < before and snapshot.id != newest
    ]


def _list_data(connection: duckdb.DuckDBPyConnection, project: Project) -> dict[File, int]:
    """Return the files of the lake with their bytes."""
    if not project.is_stored:
        return list_tree(Path(project.data_path))
    return {file: listed.size_bytes for file, listed in list_stored(connection, f"{project.data_path}**").items()}


def list_tree(folder: Path) -> dict[File, int]:
    """Return the files below *folder* with their bytes."""
    found: dict[File, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                found[path] = path.stat().st_size
            except FileNotFoundError:
                pass  # another cleanup was faster
    return found


def _expire_snapshots(connection: duckdb.DuckDBPyConnection, retention: timedelta) -> int:
    expired = list_expired(list_snapshots(connection), before=datetime.now(UTC) - retention)
    if expired:
        connection.execute(f"call ducklake_expire_snapshots('lake', versions => {expired})")
    return len(expired)


def _delete_unneeded(connection: duckdb.DuckDBPyConnection, retention: timedelta) -> None:
    """Delete the files that expired snapshots left behind.

    They go at once, since their snapshots were replaced longer than *retention* ago. Not so where files were merged
    lately: the small ones that a merge replaces may be in the hands of readers who began just before it, and
    DuckLake 1.0 does not tell the two apart but by age.
    """
    since = datetime.now(UTC) - retention
    rows = connection.execute(
        "select count(*) from lake.snapshots() where snapshot_time >= ? and map_contains(changes, 'merge_adjacent')",
        [since],
    ).fetchall()
    if rows[0][0] == 0:
        connection.execute("call ducklake_cleanup_old_files('lake', cleanup_all => true)")
    else:
        connection.execute("call ducklake_cleanup_old_files('lake', older_than => $since)", {"since": since})


def _merge_small_files(connection: duckdb.DuckDBPyConnection) -> int:
    """Merge files that are smaller than ``MERGE_BELOW_BYTES``; return how many took their place."""
    # DuckLake keeps a few rows in its catalog rather than in a file; of a table that grows by a few rows each night
    # they would pile up there.
    latest = latest_publication(connection)
    grown = {state.table for state in (latest.states if latest else ())} & {*list_tables(connection, "lake.main")}
    for table in sorted(grown):
        connection.execute(
            f"call ducklake_flush_inlined_data('lake', schema_name => 'main', table_name => {quote_literal(table)})"
        )
        _rewrite_files(connection, table)
    merge = f"call ducklake_merge_adjacent_files('lake', max_file_size => {MERGE_BELOW_BYTES})"
    return sum(int(row[-1]) for row in connection.execute(merge).fetchall())


def _rewrite_files(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """Write small files again where some of their rows were deleted, and larger ones where many were.

    DuckLake does not merge a file with deleted rows, so that those of a table that is merged into each night would grow
    in number without end, and readers read what is deleted too. Its own ``ducklake_rewrite_data_files`` knows no
    difference between a small and a large file, and breaks off where the rows fill more than one (DuckDB 1.5).
    """
    name = f"lake.main.{quote_identifier(table)}"
    if "filename" in {column.casefold() for column in list_columns(connection, name)}:
        return  # it hides the name of the file
    sizes: dict[str, int] = dict(
        connection.execute(
            f"select data_file, data_file_size_bytes from ducklake_list_files('lake', {quote_literal(table)}, "
            "schema => 'main') where delete_file is not null"
        ).fetchall()
    )
    if not sizes:
        return
    files = ", ".join(map(quote_literal, sizes))
    written = connection.execute(f"select file_name, num_rows from parquet_file_metadata([{files}])").fetchall()
    present = dict(
        connection.execute(f"select filename, count(*) from {name} where filename in ({files}) group by 1").fetchall()
    )
    doomed = [
        file
        for file, rows in written
        if sizes[file] < MERGE_BELOW_BYTES or present.get(file, 0) < (1 - REWRITE_SHARE) * rows
    ]
    if doomed:
        among = f"filename in ({', '.join(map(quote_literal, doomed))})"
        # Deleted rows that are noted in the catalog would leave a file in place of which none is left.
        connection.execute("set ducklake_default_data_inlining_row_limit = 0")
        connection.execute("begin")
        connection.execute(f"insert into {name} by name select * from {name} where {among}")
        connection.execute(f"delete from {name} where {among}")
        connection.execute("commit")
        connection.execute("reset ducklake_default_data_inlining_row_limit")
    if len(present) < len(written):
        # Batches have left such files too.
        connection.execute(
            f"call ducklake_rewrite_data_files('lake', {quote_literal(table)}, schema => 'main', delete_threshold => 1)"
        )


def _list_orphans(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the Parquet files among those of the lake that no snapshot knows."""
    listed = "call ducklake_delete_orphaned_files('lake', cleanup_all => true, dry_run => true)"
    return [str(name) for (name,) in connection.execute(listed).fetchall()]


def _delete_stored_orphans(
    connection: duckdb.DuckDBPyConnection, project: Project, files: Iterable[File], grace: timedelta
) -> None:
    """Delete the files on S3 that neither a snapshot nor a manifest knows; younger ones may get a manifest yet.

    DuckLake deletes them: they are put on its list of files that nobody needs any more. So no other client of S3 is
    needed, and what a killed cleanup leaves is deleted by the next.
    """
    staged = {file for batch in list_batches(project) for file in list_files(project, batch.id)}
    youngest = datetime.now(UTC) - grace
    listed = list_stored(connection, f"{project.data_path}**/*.parquet")
    orphans = {StoredFile(name) for name in _list_orphans(connection)} & set(files) & listed.keys() - staged
    doomed = sorted(file for file in orphans if listed[file].modified_at < youngest)
    if doomed:
        schema = quote_identifier(find_schema(project.catalog) if project.catalog else "main")
        # Of the list: id, path, is that relative, since when.
        connection.executemany(
            f"insert into __ducklake_metadata_lake.{schema}.ducklake_files_scheduled_for_deletion "
            "values (?, ?, false, 'epoch'::timestamptz)",
            [[_NO_DATA_FILE + number, str(file)] for number, file in enumerate(doomed)],
        )
        connection.execute("call ducklake_cleanup_old_files('lake', older_than => '1971-01-01'::timestamptz)")


def _delete_orphans(connection: duckdb.DuckDBPyConnection, files: Iterable[File], grace: timedelta) -> None:
    """Delete the Parquet files that no snapshot knows; under the writer's lock nobody is linking new ones."""
    youngest = datetime.now(UTC).timestamp() - grace.total_seconds()
    known = set(files)
    for name in _list_orphans(connection):
        path = Path(name)
        # Only what was there when the lock was taken and the catalog agrees that nobody needs.
        if path in known and (path.name.startswith(FILE_PREFIX) or path.stat().st_mtime < youngest):
            path.unlink(missing_ok=True)
