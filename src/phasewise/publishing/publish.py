"""Publish a staged batch as one snapshot of the lake: tables and marts together, or nothing.

The staged Parquet files are not rewritten: they are linked into the lake's data folder and registered, so that a
table of any size is published in milliseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import duckdb

from phasewise.errors import LakeError, NothingStaged, PublishConflict
from phasewise.lake.marts import MARTS_SCHEMA, build_marts, find_buildable, order_marts
from phasewise.lake.object_store import File as File
from phasewise.lake.publications import Publication as Publication
from phasewise.lake.publications import PublishedTable as PublishedTable
from phasewise.lake.publications import (
    TableState,
    find_publication,
    latest_publication,
    list_keys,
    list_tables,
    require_publication,
)
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import read_parquet
from phasewise.project.config import Mart, Project
from phasewise.publishing.audits import group_by_table
from phasewise.publishing.file_links import link_files
from phasewise.publishing.increments import (
    Increment,
    apply_increment,
    describe_increment,
    find_last,
    select_replacement,
)
from phasewise.publishing.quarantine import SetAside, publish_quarantine, remove_registered, take_out
from phasewise.publishing.writer import open_writer, sign, transaction
from phasewise.settings import Settings
from phasewise.staging.batch import mark_published, read_plan
from phasewise.staging.manifest import Manifest, list_manifests


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

    Does not audit: see ``phasewise.publishing.audit_batch``. The tables *without* may be missing; readers keep their
    last version.
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
    files = link_files(connection, project, staged)
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
        sign(connection, replace(planned, tables=tuple(tables), states=states, keys=known), message)
        if not (only or any(table.added or table.changed or table.removed for table in tables)):
            _change_something(connection, planned)
    return require_publication(connection, project)


def _describe(
    connection: duckdb.DuckDBPyConnection, project: Project, parts: Sequence[Manifest], aside: SetAside | None
) -> Increment | None:
    """Return how one table changes; None for one that its staged files replace as they are."""
    load = parts[0].load
    is_plain = load.is_replaced and load.mode != "history" and project.find_table(parts[0].table).drift != "discard"
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
        publish_table(connection, table.name, files, rows=table.rows + table.quarantined)
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
    return (*key, "valid_from") if part.load.mode == "history" else key


def _refuse_to_go_back(connection: duckdb.DuckDBPyConnection, planned: Publication) -> None:
    """Refuse a batch that began before the one that readers see: its tables would be older than theirs."""
    latest = latest_publication(connection)
    if latest is not None and planned.staged_at < latest.staged_at:
        raise PublishConflict(
            f'The batch "{planned.batch}" began {planned.staged_at:%Y-%m-%d %H:%M:%S} UTC, before the batch '
            f'"{latest.batch}" that is published ({latest.staged_at:%Y-%m-%d %H:%M:%S} UTC).',
            hint="Start a new batch: make run-distributed.",
        )


def publish_table(connection: duckdb.DuckDBPyConnection, table: str, files: Sequence[File], *, rows: int) -> None:
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
