"""The quarantine: rows that break a row-wise audit, set aside so that the rest of their table can be published.

``_quarantine.<table>`` of the lake has the columns of the table and why, in which batch and when a row was set aside.
A row is identified by what an audit returns: all columns of the table (then those rows that are equal to it in all of
them), or else the table's key. Within one file its number identifies it for good.

The rows of a table that can be set aside are a pool: those of its staged files that the batch puts into the table, or
those of its quarantine when they are to come back (``phasewise.publishing.audit_batch`` says which). Rows that are
published already are not among them.

A table that is replaced has its quarantine replaced too. An increment adds to it, and removes the rows of which it read
a newer version, or which the source no longer has.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from phasewise.errors import ProjectError, PublishConflict, StagingError
from phasewise.lake.publications import Publication
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import read_parquet
from phasewise.publishing.increments import (
    FILE,
    ROW,
    Increment,
    TableFiles,
    is_same,
    select_columns,
    select_pool,
    select_result,
)
from phasewise.publishing.session import QUARANTINE_SCHEMA, Stage, WarehouseSession
from phasewise.staging.manifest import Manifest, digest_path

#: Columns of a quarantine's table besides those of the table itself.
REASON, BATCH, SET_ASIDE_AT = "_reason", "_batch", "_set_aside_at"
COUNT = "_phasewise_count"
#: Tables that the session keeps: what the audit that runs found; the rows that are set aside, and those that are new
#: among them; the rows to set aside while publishing; what stays in a quarantine, and what was read again of it.
BAD_ROWS = "bad rows"
_FOUND, _FRESH = "found", "fresh"
_OUT, _OLD, _READ = "out", "old", "read"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The rows of one table that can be set aside."""

    table: str
    key: tuple[str, ...]
    #: How they change the table; those that were set aside are out of it.
    increment: Increment

    @property
    def rows(self) -> str:
        """The SELECT of those that are not set aside, with ``FILE`` and ``ROW``."""
        return select_pool(self.increment)


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """The rows of one staged table that are to go into quarantine."""

    table: str
    rows: int
    #: Audit → rows that broke it; a row may have broken several.
    reasons: tuple[tuple[str, int], ...]
    #: Parquet: name of the staged file, number of the row in it, reason. None: the rows are in the lake's quarantine.
    file: Path | None = None
    #: Of that file, as the audits left it.
    digest: str | None = None

    def describe(self) -> str:
        noun = "row is" if self.rows == 1 else "rows are"
        return f"{self.rows} {noun} in quarantine: " + ", ".join(f"{name} {count}" for name, count in self.reasons)


def make_pool(session: WarehouseSession, increment: Increment, key: Sequence[str]) -> Pool:
    """Return the pool of the rows of *increment*, which *key* tells apart; see ``open_pools``."""
    out = f"(select file, row from {session.name(_FOUND)} where tbl = {quote_literal(increment.table)})"
    return Pool(table=increment.table, key=tuple(key), increment=replace(increment, out=out))


def open_pools(session: WarehouseSession, pools: Iterable[Pool]) -> None:
    """Make *session* ready to take rows out of *pools*; nothing is set aside yet.

    Raises:
        ProjectError: a table has a column whose name the quarantine needs.
    """
    for name in (_FOUND, _FRESH):
        session.keep(name, "select '' as tbl, '' as file, 0::bigint as row, '' as audit where false")
    for pool in pools:
        reserved = {REASON, BATCH, SET_ASIDE_AT, "filename", "file_row_number", "rowid"}
        if clash := sorted(reserved & {column.casefold() for column in pool.increment.staged}):
            raise ProjectError(
                f'Rows of table "{pool.table}" cannot be set aside: it has a column "{clash[0]}", '
                "a name that the quarantine needs.",
                hint=f'Make its audits blocking, or leave the column out: [table."{pool.table}"] exclude.',
            )


def keep_in(session: WarehouseSession, pool: Pool, condition: str) -> None:
    """Set those rows of *pool* aside, whose alias is s, for which *condition* holds."""
    session.connection.execute(
        f"insert into {session.name(_FOUND)} select ?, s.filename, s.file_row_number, 'kept' "
        f"from {pool.increment.read} as s where {condition}",
        [pool.table],
    )


def take_bad_rows(session: WarehouseSession, pool: Pool, audit: str) -> str | None:
    """Mark the rows of *pool* that ``BAD_ROWS`` identifies, for the reason *audit*; return why that is not possible."""
    session.expect(Stage.SHOWING)
    bad_rows = session.name(BAD_ROWS)
    columns = {name: type_ for name, type_ in session.list_columns(f"({pool.rows})").items() if name not in (FILE, ROW)}
    returned = session.list_columns(bad_rows)
    by = list(columns) if columns.keys() <= returned.keys() else list(pool.key)
    if not by or not set(by) <= returned.keys():
        return (
            f'to set rows aside it must return all columns of "{pool.table}"'
            + (f" or its key ({', '.join(pool.key)})" if pool.key else ", which has no key")
            + f"; it returns {', '.join(returned)}"
        )
    if changed := next((name for name in by if returned[name] != columns.get(name)), None):
        return f'it returns the column "{changed}" as {returned[changed]}, and the table has {columns.get(changed)}'
    is_meant = is_same(by, "p", "b")
    strangers = session.count(f"{bad_rows} as b where not exists (from ({pool.rows}) as p where {is_meant})")
    if strangers:
        return (
            f"it returns {strangers} rows that are not among those that can be set aside: rows that this batch brings"
        )
    session.connection.execute(
        f'insert into {session.name(_FRESH)} select ?, p."{FILE}", p."{ROW}", ? from ({pool.rows}) as p '
        f"where exists (from {bad_rows} as b where {is_meant})",
        [pool.table, audit],
    )
    return None


def set_aside(session: WarehouseSession, pools: Iterable[Pool]) -> int:
    """Take the rows that were marked out of the views of their tables; return how many are out for the first time."""
    found, fresh = session.name(_FOUND), session.name(_FRESH)
    unseen = f"{fresh} anti join {found} using (tbl, file, row)"
    new = session.count(f"(select distinct tbl, file, row from {unseen})")
    session.connection.execute(f"insert into {found} select distinct * from {unseen}")
    session.connection.execute(f"delete from {fresh}")
    for pool in pools:
        if count_rows(session, pool.table):
            show_rest(session, pool)
    return new


def show_rest(session: WarehouseSession, pool: Pool) -> None:
    """Show the rows of the pool's table without those that are set aside."""
    session.show(pool.table, select_result(session, pool.increment))


def count_rows(session: WarehouseSession, table: str) -> int:
    """Return how many rows of *table* are set aside."""
    return session.count(f"(select distinct file, row from {session.name(_FOUND)} where tbl = {quote_literal(table)})")


def count_reasons(session: WarehouseSession, table: str) -> tuple[tuple[str, int], ...]:
    """Return each audit that rows of *table* were set aside for, with their number."""
    rows = session.connection.execute(
        f"select audit, count(*) from {session.name(_FOUND)} where tbl = ? group by 1 order by 1", [table]
    ).fetchall()
    return tuple((str(audit), int(count)) for audit, count in rows)


def write_set_aside(session: WarehouseSession, table: str, folder: Path) -> SetAside | None:
    """Write down in *folder*, the staging of *table*, which of its rows are set aside; None when none is.

    Raises:
        StagingError: the folder cannot be written.
    """
    rows = count_rows(session, table)
    if not rows:
        return None
    # Under a name of its own: who audits the same batch at the same time must not change what this one found.
    path = folder / f"quarantine-{uuid.uuid4().hex}.parquet"
    select = (
        f"select parse_filename(file) as file, row, string_agg(audit, '; ' order by audit) as reason "
        f"from {session.name(_FOUND)} as f where tbl = {quote_literal(table)} group by f.file, row"
    )
    try:
        session.connection.execute(f"copy ({select}) to {quote_literal(str(path))} (format parquet)")
        digest = digest_path(path)
    except (duckdb.Error, OSError) as exc:
        path.unlink(missing_ok=True)
        raise StagingError(
            f'Which rows of "{table}" are set aside cannot be written to {folder}: {exc}.',
            hint="Free disk space or make the folder writable, then resume the batch.",
        ) from exc
    return SetAside(table=table, rows=rows, reasons=count_reasons(session, table), file=path, digest=digest)


def read_set_aside(session: WarehouseSession, table: str, batch: str) -> SetAside | None:
    """Return which rows of *table* are in the lake's quarantine since *batch* was published; None when none is."""
    if table not in session.quarantined:
        return None
    name = f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}"
    rows = session.connection.execute(
        f"select string_split({REASON}, '; ') from {name} where {BATCH} = ?", [batch]
    ).fetchall()
    counts = Counter(str(name) for (names,) in rows for name in names)
    return SetAside(table=table, rows=len(rows), reasons=tuple(sorted(counts.items()))) if rows else None


def take_out(session: WarehouseSession, increment: Increment, aside: SetAside, parts: Sequence[Manifest]) -> Increment:
    """Return *increment*, which was staged in *parts*, without the rows of *aside*.

    Raises:
        PublishConflict: the staged files, or what was set aside of them, are not what was audited.
    """
    assert aside.file is not None  # only what is published already has none
    if not aside.file.is_file() or digest_path(aside.file) != aside.digest:
        raise _refuse_set_aside(f'Which rows of table "{increment.table}" are set aside is not what the audits found.')
    names = (file.name for file in TableFiles.staged(session.project, parts).rows)
    paths = ", ".join(
        f"({quote_literal(name)}, {quote_literal(str(file))})"
        for name, file in zip(names, increment.files, strict=True)
    )
    query = (
        "select path as file, row, reason "
        f"from {read_parquet([aside.file])} join (values {paths}) as v(name, path) on file = name"
    )
    increment = replace(increment, out=session.keep(_OUT, query))
    found = session.count(f"({increment.select_out()})")
    if found != aside.rows:
        raise _refuse_set_aside(
            f'Of table "{increment.table}" {aside.rows} rows were to be set aside, and {found} were found.'
        )
    return increment


def _refuse_set_aside(problem: str) -> PublishConflict:
    return PublishConflict(problem, hint="The staging has changed since it was audited: run final-etl-job again.")


def remove_registered(session: WarehouseSession, increment: Increment) -> None:
    """Delete the rows that are set aside from the table, for which the files of *increment* were registered."""
    session.expect(Stage.CHANGING)
    session.connection.execute(f"delete from {increment.lake} as s where {increment.is_out}")


def publish_quarantine(
    session: WarehouseSession, table: str, increment: Increment | None, publication: Publication
) -> None:
    """In the transaction that changed *table*: bring its quarantine up to date.

    None for *increment* says that the table was replaced, and no row of it set aside.
    """
    session.expect(Stage.CHANGING)
    if increment is None or (increment.load.is_replaced and increment.out is None):
        drop_quarantine(session, table)
        return
    at = quote_literal(publication.at.isoformat())
    stamp = (f"{quote_literal(publication.batch)} as {BATCH}", f"{at}::timestamptz as {SET_ASIDE_AT}")
    rows = increment.select_out(f"o.reason as {REASON}", *stamp) if increment.out else None
    if not increment.load.reads_all and table in session.quarantined:
        is_changed = _copy_what_stays(session, increment)
        if not is_changed and rows is None:
            return
        old = f"from {session.name(_OLD)}"
        rows = f"{old} union all by name {rows}" if rows else old
    if rows is None or not session.count(f"({rows})"):
        drop_quarantine(session, table)
        return
    session.connection.execute(f"create schema if not exists lake.{QUARANTINE_SCHEMA}")
    session.connection.execute(f"create or replace table lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)} as {rows}")


def _copy_what_stays(session: WarehouseSession, increment: Increment) -> bool:
    """Keep what stays of the quarantine as ``_OLD``; return whether it differs from what is there.

    A row goes when the increment read another version of it. Where several rows of one key are in quarantine, nobody
    knows which of them was read: they go only when as many were. Rows without a key are known by all their values.
    """
    name = f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(increment.table)}"
    columns, key = increment.drift.columns, increment.load.key
    before = session.list_columns(name)
    present = {column: type_ for column, type_ in before.items() if column not in (REASON, BATCH, SET_ASIDE_AT)}
    query = f"select {select_columns(columns, present)}, {REASON}, {BATCH}, {SET_ASIDE_AT} from {name}"
    stays = session.keep(_OLD, query)
    if key:
        _drop_read_again(session, increment, stays)
    if increment.key_files:
        session.connection.execute(
            f"delete from {stays} as q "
            f"where not exists (from ({increment.select_keys()}) as k where {is_same(key, 'k', 'q')})"
        )
    return session.count(stays) < session.count(name) or session.list_columns(stays) != before


def _drop_read_again(session: WarehouseSession, increment: Increment, stays: str) -> None:
    columns, key = increment.drift.columns, increment.load.key
    keys = ", ".join(map(quote_identifier, key))
    has_key = " and ".join(f"q.{quote_identifier(column)} is not null" for column in key)
    read = f"(select *, count(*) over (partition by {keys}) as {COUNT} from ({increment.select_staged(is_all=True)}))"
    old = f"(select {keys}, count(*) as {COUNT} from {stays} group by {keys})"
    again = session.keep(
        _READ, f"select n.* from {read} as n join {old} as q on {is_same(key, 'n', 'q')} where n.{COUNT} >= q.{COUNT}"
    )
    session.connection.execute(
        f"delete from {stays} as q where {has_key} and exists (from {again} as n where {is_same(key, 'n', 'q')})"
    )
    session.connection.execute(
        f"delete from {stays} as q where not ({has_key}) "
        f"and exists (from {again} as n where {is_same(columns, 'n', 'q')})"
    )


def drop_put_back(session: WarehouseSession, table: str) -> None:
    """In the transaction: remove the rows from the quarantine of *table* that are not set aside (again)."""
    session.expect(Stage.CHANGING)
    name = f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}"
    stays = f"exists (from {session.name(_FOUND)} as q where q.tbl = {quote_literal(table)} and q.row = s.rowid)"
    session.connection.execute(f"delete from {name} as s where not {stays}")
    if not session.count(name):
        drop_quarantine(session, table)


def select_quarantined(table: str) -> str:
    """Return the relation of the rows in quarantine, with what tells them apart as in a staged file."""
    name = quote_identifier(table)
    return (
        f"(select * exclude ({REASON}, {BATCH}, {SET_ASIDE_AT}), '' as filename, rowid as file_row_number "
        f"from lake.{QUARANTINE_SCHEMA}.{name})"
    )


def drop_quarantine(session: WarehouseSession, table: str) -> None:
    """Drop the quarantine of *table*, if it has one."""
    if table in session.quarantined:
        session.connection.execute(f"drop table lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}")
