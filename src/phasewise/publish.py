"""Publish: the one writer. A staged batch becomes one snapshot of the lake, tables and marts together, or nothing.

The staged Parquet files are not rewritten: they are linked into the lake's data folder and registered, so that a
table of any size is published in milliseconds. They are linked because DuckLake owns what it registers, and
deletes it once no snapshot needs it. On S3, which has no links, they were written into the lake's folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from phasewise.audit import group_by_table
from phasewise.disk import sync_path
from phasewise.errors import LakeError, NothingStaged, PublishConflict, StagingError
from phasewise.lake import (
    attach_lake,
    list_extensions,
    lock_lake,
    open_session,
    quote_identifier,
    quote_literal,
    read_parquet,
)
from phasewise.marts import MARTS_SCHEMA, build_marts, find_buildable, order_marts
from phasewise.merge import Increment, apply_increment, describe_increment, find_last, select_replacement
from phasewise.project import Mart, Project
from phasewise.quarantine import QUARANTINE_SCHEMA, SetAside, publish_quarantine, remove_registered, take_out
from phasewise.queries import fetch_int, first_line
from phasewise.settings import Settings
from phasewise.snapshots import Publication as Publication
from phasewise.snapshots import PublishedTable as PublishedTable
from phasewise.snapshots import (
    TableState,
    find_publication,
    latest_publication,
    list_columns,
    list_keys,
    list_tables,
    require_publication,
)
from phasewise.staging import (
    Manifest,
    advise_again,
    list_manifests,
    mark_published,
    measure_file,
    read_plan,
    staged_files,
)
from phasewise.storage import FILE_PREFIX
from phasewise.storage import File as File

#: ``link`` fails with these where the lake lies on another file system, or on one that has no links.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def publish_batch(
    project: Project,
    settings: Settings,
    batch: str,
    *,
    without: Collection[str] = (),
    is_partial: bool = False,
    set_aside: Sequence[SetAside] = (),
) -> Publication:
    """Publish the staged tables of *batch*, and the marts built from them, as one snapshot.

    Does not audit: see ``phasewise.isolation``. The tables *without* may be missing; readers keep their last version.
    With *is_partial* marts that need a table which is neither staged nor published are left out. The rows *set_aside*
    go to the quarantine of their table, in place of what was there.
    Publishing a batch that is published already changes nothing. However the process ends, readers see all of the
    batch or nothing of it.

    Raises:
        NothingStaged: no table of the batch is staged.
        PublishConflict: a table of the batch is not staged, or a newer batch is published.
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
        ProjectError: a mart's SQL fails.
        LakeError: the warehouse cannot be written. As with all of these, it is unchanged.
    """
    with open_writer(project, settings) as connection:
        publication = _find_published(connection, batch) or _publish(
            connection, project, batch, without, is_partial, {aside.table: aside for aside in set_aside}
        )
    if list_manifests(project, batch):
        mark_published(project, batch, publication.snapshot)
    return publication


def renew_marts(project: Project, settings: Settings) -> Publication:
    """Build the marts again from the tables that are published, as a snapshot of its own.

    Raises:
        LakeError: nothing was published yet.
    """
    with open_writer(project, settings) as connection:
        latest = require_publication(connection, project)
        only = find_buildable(connection, project, list_tables(connection, "lake.main"))
        marts = tuple(mart.name for mart in only)
        with transaction(connection, replace(latest, kind="marts", marts=marts), "Build the marts again"):
            build_marts(connection, project, schema=f"lake.{MARTS_SCHEMA}", only=only)
        return require_publication(connection, project)


def rollback_batch(project: Project, settings: Settings, batch: str) -> Publication:
    """Make all tables and marts what they were when *batch* was published, as a new snapshot.

    Tables that came later are dropped. Nothing is lost: the batches since then stay in their own snapshots until
    they are older than ``snapshot_retention_days``.

    Raises:
        PublishConflict: no snapshot carries *batch*.
    """
    with open_writer(project, settings) as connection:
        target = find_publication(connection, batch)
        attach_lake(connection, project, snapshot=target.snapshot, name="past")
        files = _link_past_files(connection, project, target.snapshot)
        with transaction(connection, replace(target, kind="rollback"), f"Roll back to batch {batch}"):
            for schema in ("main", MARTS_SCHEMA, QUARANTINE_SCHEMA):
                _restore_schema(connection, schema, files if schema == "main" else {})
        return require_publication(connection, project)


@contextmanager
def open_writer(project: Project, settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """Be the one writer of the warehouse, with it attached as ``lake``.

    Raises:
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
    """
    with (
        lock_lake(project, timeout=settings.lock_timeout),
        open_session(settings, extensions=list_extensions(project)) as connection,
    ):
        attach_lake(connection, project)
        yield connection


def _find_published(connection: duckdb.DuckDBPyConnection, batch: str) -> Publication | None:
    try:
        return replace(find_publication(connection, batch), was_published=True)
    except PublishConflict:
        return None


def _publish(
    connection: duckdb.DuckDBPyConnection,
    project: Project,
    batch: str,
    without: Collection[str],
    is_partial: bool,
    set_aside: Mapping[str, SetAside],
) -> Publication:
    staged = group_by_table(list_manifests(project, batch))
    if not staged:
        raise NothingStaged(f'Nothing is staged for the batch "{batch}".', hint="Load it first: make run-distributed.")
    _refuse_incomplete(project, batch, {*staged, *without})
    present = {*staged, *list_tables(connection, "lake.main")}
    only = find_buildable(connection, project, present) if is_partial else order_marts(project.marts)
    planned = _subtract(_plan(project, batch, staged, only), set_aside)
    _refuse_to_go_back(connection, planned)
    files = _link_files(connection, project, staged)
    message = f"Publish batch {batch}"
    with transaction(connection, planned, message):
        tables = []
        for table in planned.tables:
            increment = _describe(connection, project, staged[table.name], set_aside.get(table.name))
            tables.append(_load_table(connection, table, increment, files[table.name]))
            publish_quarantine(connection, table.name, increment, planned)
        build_marts(connection, project, schema=f"lake.{MARTS_SCHEMA}", only=only)
        states = _find_states(connection, batch, staged)
        keys = list_keys(connection) | {table.name: table.key for table in tables}
        known = {table: key for table, key in keys.items() if key}
        _sign(connection, replace(planned, tables=tuple(tables), states=states, keys=known), message)
        if not (only or any(table.added or table.changed or table.removed for table in tables)):
            _change_something(connection, planned)
    return require_publication(connection, project)


def _describe(
    connection: duckdb.DuckDBPyConnection, project: Project, parts: Sequence[Manifest], aside: SetAside | None
) -> Increment | None:
    """Return how one table changes; None for one that its staged files replace as they are."""
    load = parts[0].load
    is_plain = load.is_replaced and load.mode != "snapshot" and project.find_table(parts[0].table).drift != "discard"
    # A plain table needs no look at the columns: a full refresh of many tables is the usual case, and must stay fast.
    if is_plain and aside is None:
        return None
    increment = describe_increment(connection, project, parts)
    return increment if aside is None else take_out(connection, increment, aside)


def _load_table(
    connection: duckdb.DuckDBPyConnection, table: PublishedTable, increment: Increment | None, files: Sequence[File]
) -> PublishedTable:
    """Bring one table up to date; return it with the rows that it has then."""
    name = f"lake.main.{quote_identifier(table.name)}"
    if increment is None or (increment.load.is_replaced and not increment.is_rewritten):
        _publish_table(connection, table.name, files, rows=table.rows + table.quarantined)
        if increment is not None and increment.out is not None:
            remove_registered(connection, increment, files)
        return table
    found = fetch_int(connection, f"select count(*) from {increment.read}")
    _refuse_other_rows(table.name, found, table.rows + table.quarantined)
    if increment.load.is_replaced:
        connection.execute(f"create or replace table {name} as {select_replacement(increment)}")
        return table
    changes = apply_increment(connection, increment, files)
    rows = fetch_int(connection, f"select count(*) from {name}")
    return replace(table, rows=rows, added=changes.added, changed=changes.changed, removed=changes.removed)


def _find_states(
    connection: duckdb.DuckDBPyConnection, batch: str, staged: Mapping[str, Sequence[Manifest]]
) -> tuple[TableState, ...]:
    """Return what the next batch goes on from: of the tables of this one, and unchanged of all others."""
    latest = latest_publication(connection)
    names = {table.casefold() for table in staged}
    kept = [state for state in (latest.states if latest else ()) if state.table.casefold() not in names]
    new = [
        parts[0].load.state_after(table, batch, find_last(connection, parts))
        for table, parts in staged.items()
        if parts[0].load.mode != "full"
    ]
    return tuple(sorted([*kept, *new], key=lambda state: state.table))


def _change_something(connection: duckdb.DuckDBPyConnection, publication: Publication) -> None:
    """Make sure that there is a snapshot to carry the batch: DuckLake makes none for a commit without a change."""
    table = quote_identifier(publication.tables[0].name)
    connection.execute(f"comment on table lake.main.{table} is {quote_literal(f'batch {publication.batch}')}")


def _refuse_incomplete(project: Project, batch: str, present: Collection[str]) -> None:
    plan = read_plan(project, batch)
    missing = [f'table "{table}"' for table in (plan.tables if plan else ()) if table not in present]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise PublishConflict(
            f"Batch {batch} is not complete: {', '.join(missing)} {verb} not staged. Nothing was published.",
            hint="Resume it: what is staged is kept.",
        )


def _plan(project: Project, batch: str, staged: Mapping[str, Sequence[Manifest]], marts: Sequence[Mart]) -> Publication:
    plan = read_plan(project, batch)
    parts = [part for table in staged.values() for part in table]
    return Publication(
        batch=batch,
        snapshot=-1,
        at=datetime.now(UTC),
        staged_at=plan.created_at if plan else min(part.started_at for part in parts),
        tables=tuple(
            PublishedTable(
                name=table,
                rows=sum(part.rows for part in parts),
                size_bytes=sum(part.size_bytes for part in parts),
                key=_find_key(project, parts[0]),
                mode=parts[0].load.mode,
            )
            for table, parts in staged.items()
        ),
        marts=tuple(mart.name for mart in marts),
    )


def _subtract(planned: Publication, set_aside: Mapping[str, SetAside]) -> Publication:
    counts = {table: aside.rows for table, aside in set_aside.items()}
    tables = [
        replace(table, rows=table.rows - counts.get(table.name, 0), quarantined=counts.get(table.name, 0))
        for table in planned.tables
    ]
    return replace(planned, tables=tuple(tables))


def _find_key(project: Project, part: Manifest) -> tuple[str, ...]:
    key = project.find_table(part.table).key or part.key
    return (*key, "valid_from") if part.load.mode == "snapshot" else key


def _refuse_to_go_back(connection: duckdb.DuckDBPyConnection, planned: Publication) -> None:
    """Refuse a batch that began before the one that readers see: its tables would be older than theirs."""
    latest = latest_publication(connection)
    if latest is not None and planned.staged_at < latest.staged_at:
        raise PublishConflict(
            f'The batch "{planned.batch}" began {planned.staged_at:%Y-%m-%d %H:%M:%S} UTC, before the batch '
            f'"{latest.batch}" that is published ({latest.staged_at:%Y-%m-%d %H:%M:%S} UTC).',
            hint="Start a new batch: make run-distributed.",
        )


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection, publication: Publication, message: str) -> Iterator[None]:
    """Run the block in one transaction of the lake, whose commit carries *message* and *publication*.

    Raises:
        LakeError: DuckDB refused something; everything is as it was.
    """
    try:
        connection.execute("begin")
        _sign(connection, publication, message)
        yield
        connection.execute("commit")
    except duckdb.Error as exc:
        _roll_back(connection)
        raise LakeError(
            f"{message} failed: {first_line(exc).rstrip('.')}. The warehouse is unchanged.",
            hint="Check the free space and the permissions of its folder, then try again.",
        ) from exc
    except BaseException:
        _roll_back(connection)
        raise


def _sign(connection: duckdb.DuckDBPyConnection, publication: Publication, message: str) -> None:
    """Say what the commit of the open transaction will carry; the last word counts."""
    connection.execute(
        "call lake.set_commit_message('phasewise', $message, extra_info => $extra_info)",
        {"message": message, "extra_info": publication.to_extra_info()},
    )


def _roll_back(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("rollback")
    except duckdb.Error:
        pass  # a failed commit has ended the transaction itself


def _publish_table(connection: duckdb.DuckDBPyConnection, table: str, files: Sequence[File], *, rows: int) -> None:
    """Replace *table* by *files*, whatever columns it had before.

    Raises:
        LakeError: DuckLake does not take them, such as for a type that it lacks.
        PublishConflict: they do not have *rows* rows.
    """
    name = f"lake.main.{quote_identifier(table)}"
    paths = ", ".join(quote_literal(str(file)) for file in files)
    try:
        connection.execute(f"create or replace table {name} as from {read_parquet(files)} limit 0")
        connection.execute(
            f"call ducklake_add_data_files('lake', {quote_literal(table)}, [{paths}], "
            "schema => 'main', hive_partitioning => false)"
        )
        found = fetch_int(connection, f"select count(*) from {name}")
    except duckdb.Error as exc:
        raise LakeError(
            # All of its lines: the second says which type it did not take.
            f'Table "{table}" cannot be published: {" ".join(str(exc).split())}. The warehouse is unchanged.',
            hint="Read it through a view that casts the column, or exclude the table.",
        ) from exc
    _refuse_other_rows(table, found, rows)


def _refuse_other_rows(table: str, found: int, rows: int) -> None:
    if found != rows:
        raise PublishConflict(
            f'Table "{table}" has {found} rows in its staged files, and its manifest says {rows}.',
            hint="The staging was changed by hand: start a new batch.",
        )


def _link_files(
    connection: duckdb.DuckDBPyConnection, project: Project, staged: Mapping[str, Sequence[Manifest]]
) -> dict[str, list[File]]:
    """Return, per table, its staged files as links in the lake's data folder; those on S3 as they are.

    When publishing fails they stay there, and the next cleanup removes them: to remove them here could hit a commit
    that had succeeded after all, when a signal arrives just behind it.

    Raises:
        StagingError: a staged file is missing or has another size.
        LakeError: the lake's folder cannot be written.
    """
    data = Path(project.data_path, "main")
    linked: dict[str, list[File]] = {}
    try:
        for table, parts in staged.items():
            files = [file for part in parts for file in _check_files(connection, project, part)]
            linked[table] = [
                _link(file, data / _folder_name(table)) if isinstance(file, Path) else file for file in files
            ]
        _sync_folders({file.parent for files in linked.values() for file in files if isinstance(file, Path)})
    except OSError as exc:
        raise _cannot_write(project, exc) from exc
    return linked


def _cannot_write(project: Project, exc: OSError) -> LakeError:
    return LakeError(
        f"The warehouse {project.warehouse_name} cannot be written: {exc.strerror or exc}. It is unchanged.",
        hint="Free some space, or make the folder writable, then try again.",
    )


def _check_files(connection: duckdb.DuckDBPyConnection, project: Project, manifest: Manifest) -> list[File]:
    files = staged_files(project, manifest)
    sizes = [measure_file(connection, file) for file in files]
    size_bytes = sum(size for size in sizes if size is not None)
    if None in sizes or size_bytes != manifest.size_bytes:
        raise StagingError(
            f'The staged files of table "{manifest.table}" are not those of its manifest '
            f"({size_bytes} bytes, not {manifest.size_bytes}).",
            hint=advise_again(files[0]),
        )
    return files


def _folder_name(table: str) -> str:
    """Return a folder for *table* that any file system takes; two tables may share one, their files never clash."""
    return re.sub(r"[^a-z0-9_]+", "-", table.lower())[:60].strip("-") or "table"


def _link(file: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{FILE_PREFIX}{uuid.uuid4().hex}.parquet"
    try:
        os.link(file, target)
    except OSError as exc:
        if exc.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(file, target)
        sync_path(target)
    return target


def _sync_folders(folders: Iterable[Path]) -> None:
    """Make the links durable: the commit that names them must not survive a power cut that they do not."""
    for folder in folders:
        sync_path(folder)


def _link_past_files(connection: duckdb.DuckDBPyConnection, project: Project, snapshot: int) -> dict[str, list[Path]]:
    """Return new links to the files of each table of ``past`` that was published and not changed by others since."""
    if project.is_stored:
        return {}  # a file cannot belong to two tables, and S3 has no links: the rows are written again
    try:
        linked = {
            table: [_link(file, file.parent) for file in files]
            for table in list_tables(connection, "past.main")
            if (files := _find_published_files(connection, table, snapshot))
        }
        _sync_folders({file.parent for files in linked.values() for file in files})
    except OSError as exc:
        raise _cannot_write(project, exc) from exc
    return linked


def _find_published_files(connection: duckdb.DuckDBPyConnection, table: str, snapshot: int) -> list[Path]:
    """Return the files that make up *table* of ``past``; none when it has rows, or lacks some, that they do not say."""
    past = f"past.main.{quote_identifier(table)}"
    rows = connection.execute(
        f"select data_file, delete_file from ducklake_list_files('lake', {quote_literal(table)}, "
        f"schema => 'main', snapshot_version => {snapshot})"
    ).fetchall()
    files = [Path(data) for data, _ in rows]
    if not files or any(deleted or not Path(data).name.startswith(FILE_PREFIX) for data, deleted in rows):
        return []
    columns = list_columns(connection, past)
    if "filename" in {name.casefold() for name in columns}:
        return []  # it hides the name of the file
    # Files of increments may have other columns each.
    has_all = all(list_columns(connection, read_parquet([file])) == columns for file in files)
    is_same = has_all and _count_by_file(connection, past) == _count_by_file(connection, read_parquet(files))
    return files if is_same else []


def _count_by_file(connection: duckdb.DuckDBPyConnection, relation: str) -> dict[str, int]:
    """Return how many rows of *relation* come of each file.

    A few changed rows are in DuckLake's catalog: one removed there and one added leave the number of all as it was.
    """
    return dict(connection.execute(f"select filename, count(*) from {relation} group by 1").fetchall())


def _restore_schema(connection: duckdb.DuckDBPyConnection, schema: str, files: Mapping[str, Sequence[Path]]) -> None:
    """Make the tables of *schema* those of the attached ``past``: from *files* where they are given, else rewritten."""
    then = list_tables(connection, f"past.{schema}")
    if then:
        connection.execute(f"create schema if not exists lake.{schema}")
    for table in list_tables(connection, f"lake.{schema}"):
        if table not in then:
            connection.execute(f"drop table lake.{schema}.{quote_identifier(table)}")
    for table in then:
        past = f"past.{schema}.{quote_identifier(table)}"
        if table in files:
            rows = fetch_int(connection, f"select count(*) from {past}")
            _publish_table(connection, table, files[table], rows=rows)
        else:
            connection.execute(f"create or replace table lake.{schema}.{quote_identifier(table)} as from {past}")
