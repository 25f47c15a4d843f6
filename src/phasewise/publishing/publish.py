"""Publish a staged batch as one snapshot of the lake: tables and marts together, or nothing.

The staged Parquet files are not rewritten: they are linked into the lake's data folder and registered, so that a
table of any size is registered in milliseconds. They are read once, to see that they are what was audited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import duckdb

from phasewise.errors import LakeError, NothingStaged, PublishConflict
from phasewise.lake.marts import build_marts, find_buildable, order_marts
from phasewise.lake.object_store import File
from phasewise.lake.publications import Publication, PublishedTable, TableState, find_publication, list_keys
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import read_parquet
from phasewise.project.config import Mart, Project
from phasewise.publishing.audit_batch import AuditedBatch
from phasewise.publishing.audits import raise_for
from phasewise.publishing.file_links import linked_files
from phasewise.publishing.increments import (
    Increment,
    TableFiles,
    apply_increment,
    describe_increment,
    find_last,
    register_files,
    select_replacement,
)
from phasewise.publishing.quarantine import publish_quarantine, remove_registered, take_out
from phasewise.publishing.session import Stage, WarehouseSession, open_writer
from phasewise.settings import Settings
from phasewise.staging.batch import Batch, mark_published
from phasewise.staging.manifest import Manifest


def publish_batch(project: Project, settings: Settings, audited: AuditedBatch) -> Publication:
    """Publish what was audited, and the marts built from it, as one snapshot.

    Of tables that were given up readers keep the last version. Where the batch is partial, marts that need a table
    which is neither staged nor published are left out. Rows that were set aside go to the quarantine of their table, in
    place of what was there.
    Publishing a batch that is published already changes nothing. However the process ends, readers see all of the
    batch or nothing of it.

    Raises:
        AuditFailed: a blocking audit found bad rows.
        NothingStaged: no table of the batch is staged.
        PublishConflict: staged files are not those that were audited, or a newer batch is published.
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
        ProjectError: a mart's SQL fails.
        LakeError: the warehouse cannot be written. As with all of these, it is unchanged.
    """
    raise_for(audited.results)
    batch = audited.batch
    with open_writer(project, settings) as session:
        publication = _find_published(session, batch.id) or _publish(session, audited)
    if batch.manifests:
        mark_published(project, batch.id, publication.snapshot)
    return publication


def renew_marts(project: Project, settings: Settings) -> Publication:
    """Build the marts again from the tables that are published, as a snapshot of its own.

    Raises:
        LakeError: nothing was published yet.
    """
    with open_writer(project, settings) as session:
        only = find_buildable(session.connection, project, session.tables)
        renewed = replace(session.require_latest(), kind="marts", marts=tuple(mart.name for mart in only))
        with session.change(renewed, "Build the marts again"):
            build_marts(session.connection, only)
        return session.require_latest()


def _find_published(session: WarehouseSession, batch: str) -> Publication | None:
    try:
        return replace(find_publication(session.connection, batch), was_published=True)
    except PublishConflict:
        return None


def _publish(session: WarehouseSession, audited: AuditedBatch) -> Publication:
    batch, project = audited.batch, session.project
    if not batch.manifests:
        raise NothingStaged(
            f'Nothing is staged for the batch "{batch.id}".', hint="Load it first: make run-distributed."
        )
    only = order_marts(project.marts)
    if audited.is_partial:
        only = find_buildable(session.connection, project, {*batch.tables, *session.tables})
    planned = _plan(project, audited, only)
    _refuse_to_go_back(session, planned)
    message = f"Publish batch {batch.id}"
    with linked_files(session, audited) as files:
        states, keys = _find_states(session, batch), list_keys(session.connection)
        with session.change(planned, message):
            tables = [_load_table(session, audited, table, files[table.name], planned) for table in planned.tables]
            build_marts(session.connection, only)
            keys |= {table.name: table.key for table in tables}
            known = {table: key for table, key in keys.items() if key}
            session.sign(replace(planned, tables=tuple(tables), states=states, keys=known), message)
            if not (only or any(table.added or table.changed or table.removed for table in tables)):
                _change_something(session.connection, planned)
    return session.require_latest()


def _load_table(
    session: WarehouseSession, audited: AuditedBatch, table: PublishedTable, files: TableFiles, planned: Publication
) -> PublishedTable:
    """Bring one table and its quarantine up to date; return it with the rows that it has then."""
    increment = _describe(session, audited, table.name, files)
    loaded = _load_rows(session, table, increment, files.rows)
    publish_quarantine(session, table.name, increment, planned)
    return loaded


def _describe(session: WarehouseSession, audited: AuditedBatch, table: str, files: TableFiles) -> Increment | None:
    """Return how one table changes; None for one that its staged files replace as they are."""
    parts = audited.batch.by_table[table]
    aside = next((aside for aside in audited.set_aside if aside.table == table), None)
    load = parts[0].load
    is_plain = load.is_replaced and load.mode != "history" and session.project.find_table(table).drift != "discard"
    # A plain table needs no look at the columns: a full refresh of many tables is the usual case, and must stay fast.
    if is_plain and aside is None:
        return None
    increment = describe_increment(session, parts, at=audited.batch.created_at, linked=files)
    return increment if aside is None else take_out(session, increment, aside, parts)


def _load_rows(
    session: WarehouseSession, table: PublishedTable, increment: Increment | None, files: Sequence[File]
) -> PublishedTable:
    name = f"lake.main.{quote_identifier(table.name)}"
    if increment is None or (increment.load.is_replaced and not increment.is_rewritten):
        publish_table(session, table.name, files, rows=table.rows + table.quarantined)
        if increment is not None and increment.out is not None:
            remove_registered(session, increment)
        return table
    _refuse_other_rows(table.name, session.count(increment.read), table.rows + table.quarantined)
    if increment.load.is_replaced:
        session.connection.execute(f"create or replace table {name} as {select_replacement(increment)}")
        return table
    changes = apply_increment(session, increment)
    rows = session.count(name)
    return replace(table, rows=rows, added=changes.added, changed=changes.changed, removed=changes.removed)


def _find_states(session: WarehouseSession, batch: Batch) -> tuple[TableState, ...]:
    """Return what the next batch continues from: of the tables of this one, and unchanged of all others."""
    names = {table.casefold() for table in batch.tables}
    kept = [state for name, state in session.states.items() if name not in names]
    new = [
        parts[0].load.state_after(table, batch.id, find_last(session.connection, parts))
        for table, parts in batch.by_table.items()
        if parts[0].load.mode != "full"
    ]
    return tuple(sorted([*kept, *new], key=lambda state: state.table))


def _change_something(connection: duckdb.DuckDBPyConnection, publication: Publication) -> None:
    """Make sure that there is a snapshot to carry the batch: DuckLake makes none for a commit without a change."""
    table = quote_identifier(publication.tables[0].name)
    connection.execute(f"comment on table lake.main.{table} is {quote_literal(f'batch {publication.batch}')}")


def _plan(project: Project, audited: AuditedBatch, marts: Sequence[Mart]) -> Publication:
    out = {aside.table: aside.rows for aside in audited.set_aside}
    return Publication(
        batch=audited.batch.id,
        snapshot=-1,
        at=datetime.now(UTC),
        staged_at=audited.batch.created_at,
        tables=tuple(
            PublishedTable(
                name=table,
                rows=sum(part.rows for part in parts) - out.get(table, 0),
                quarantined=out.get(table, 0),
                size_bytes=sum(part.size_bytes for part in parts),
                key=_find_key(project, parts[0]),
                mode=parts[0].load.mode,
            )
            for table, parts in audited.batch.by_table.items()
        ),
        marts=tuple(mart.name for mart in marts),
    )


def _find_key(project: Project, part: Manifest) -> tuple[str, ...]:
    key = project.find_table(part.table).key or part.key
    return (*key, "valid_from") if part.load.mode == "history" else key


def _refuse_to_go_back(session: WarehouseSession, planned: Publication) -> None:
    """Refuse a batch that began before the one that readers see: its tables would be older than theirs."""
    latest = session.latest
    if latest is not None and planned.staged_at < latest.staged_at:
        raise PublishConflict(
            f'The batch "{planned.batch}" began {planned.staged_at:%Y-%m-%d %H:%M:%S} UTC, before the batch '
            f'"{latest.batch}" that is published ({latest.staged_at:%Y-%m-%d %H:%M:%S} UTC).',
            hint="Start a new batch: make run-distributed.",
        )


def publish_table(session: WarehouseSession, table: str, files: Sequence[File], *, rows: int) -> None:
    """Replace *table* by *files*, whatever columns it had before.

    Raises:
        LakeError: DuckLake does not take them, such as for a type that it lacks.
        PublishConflict: they do not have *rows* rows.
    """
    session.expect(Stage.CHANGING)
    name = f"lake.main.{quote_identifier(table)}"
    try:
        session.connection.execute(f"create or replace table {name} as from {read_parquet(files)} limit 0")
        register_files(session.connection, table, files)
        found = session.count(name)
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
