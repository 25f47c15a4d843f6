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

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from phasewise.errors import ProjectError, PublishConflict, StagingError
from phasewise.lake.object_store import File
from phasewise.lake.publications import Publication, list_columns, list_tables
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import read_parquet
from phasewise.publishing.increments import FILE, ROW, Increment, is_same, select_columns, select_pool, select_result
from phasewise.system.files import replace_whole

QUARANTINE_SCHEMA = "_quarantine"
#: Columns of a quarantine's table besides those of the table itself.
REASON, BATCH, SET_ASIDE_AT = "_reason", "_batch", "_set_aside_at"
COUNT = "_phasewise_count"
#: Where the audit that runs leaves its bad rows.
BAD_ROWS = "audit_bad_rows"

_FOUND = "memory.quarantine.found"
_FRESH = "memory.quarantine.fresh"


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

    def describe(self) -> str:
        noun = "row is" if self.rows == 1 else "rows are"
        return f"{self.rows} {noun} in quarantine: " + ", ".join(f"{name} {count}" for name, count in self.reasons)


def make_pool(increment: Increment, key: Sequence[str]) -> Pool:
    """Return the pool of the rows of *increment*, which *key* tells apart; see ``open_pools``."""
    out = f"(select file, row from {_FOUND} where tbl = {quote_literal(increment.table)})"
    return Pool(table=increment.table, key=tuple(key), increment=replace(increment, out=out))


def open_pools(connection: duckdb.DuckDBPyConnection, pools: Iterable[Pool]) -> None:
    """Make *connection* ready to take rows out of *pools*; nothing is set aside yet.

    Raises:
        ProjectError: a table has a column whose name the quarantine needs.
    """
    connection.execute("create schema if not exists memory.quarantine")
    for name in (_FOUND, _FRESH):
        connection.execute(f"create or replace table {name} (tbl varchar, file varchar, row bigint, audit varchar)")
    for pool in pools:
        reserved = {REASON, BATCH, SET_ASIDE_AT, "filename", "file_row_number", "rowid"}
        if clash := sorted(reserved & {column.casefold() for column in pool.increment.staged}):
            raise ProjectError(
                f'Rows of table "{pool.table}" cannot be set aside: it has a column "{clash[0]}", '
                "a name that the quarantine needs.",
                hint=f'Make its audits blocking, or leave the column out: [table."{pool.table}"] exclude.',
            )


def keep_in(connection: duckdb.DuckDBPyConnection, pool: Pool, condition: str) -> None:
    """Set those rows of *pool* aside, whose alias is s, for which *condition* holds."""
    connection.execute(
        f"insert into {_FOUND} select ?, s.filename, s.file_row_number, 'kept' from {pool.increment.read} as s "
        f"where {condition}",
        [pool.table],
    )


def take_bad_rows(connection: duckdb.DuckDBPyConnection, pool: Pool, audit: str) -> str | None:
    """Mark the rows of *pool* that ``BAD_ROWS`` identifies, for the reason *audit*; return why that is not possible."""
    columns = _table_columns(connection, pool)
    returned = list_columns(connection, BAD_ROWS)
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
    strangers = fetch_int(
        connection, f"select count(*) from {BAD_ROWS} as b where not exists (from ({pool.rows}) as p where {is_meant})"
    )
    if strangers:
        return (
            f"it returns {strangers} rows that are not among those that can be set aside: rows that this batch brings"
        )
    connection.execute(
        f'insert into {_FRESH} select ?, p."{FILE}", p."{ROW}", ? from ({pool.rows}) as p '
        f"where exists (from {BAD_ROWS} as b where {is_meant})",
        [pool.table, audit],
    )
    return None


def set_aside(connection: duckdb.DuckDBPyConnection, pools: Iterable[Pool]) -> int:
    """Take the rows that were marked out of the views of their tables; return how many are out for the first time."""
    unseen = f"{_FRESH} anti join {_FOUND} using (tbl, file, row)"
    new = fetch_int(connection, f"select count(*) from (select distinct tbl, file, row from {unseen})")
    connection.execute(f"insert into {_FOUND} select distinct * from {unseen}")
    connection.execute(f"delete from {_FRESH}")
    for pool in pools:
        if count_rows(connection, pool.table):
            show_rest(connection, pool)
    return new


def show_rest(connection: duckdb.DuckDBPyConnection, pool: Pool) -> None:
    """Make the view of the pool's table show its rows without those that are set aside."""
    rest = select_result(connection, pool.increment)
    connection.execute(f"create or replace view memory.main.{quote_identifier(pool.table)} as {rest}")


def count_rows(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    """Return how many rows of *table* are set aside."""
    return fetch_int(
        connection,
        f"select count(*) from (select distinct file, row from {_FOUND} where tbl = {quote_literal(table)})",
    )


def count_reasons(connection: duckdb.DuckDBPyConnection, table: str) -> tuple[tuple[str, int], ...]:
    """Return each audit that rows of *table* were set aside for, with their number."""
    rows = connection.execute(
        f"select audit, count(*) from {_FOUND} where tbl = ? group by 1 order by 1", [table]
    ).fetchall()
    return tuple((str(audit), int(count)) for audit, count in rows)


def select_rows_out(table: str) -> str:
    """Return the query of the rows of *table* that are set aside: file, row and reason."""
    return (
        f"select file, row, string_agg(audit, '; ' order by audit) as reason from {_FOUND} "
        f"where tbl = {quote_literal(table)} group by file, row"
    )


def write_set_aside(connection: duckdb.DuckDBPyConnection, table: str, folder: Path) -> SetAside | None:
    """Write down in *folder*, the staging of *table*, which of its rows are set aside; None when none is.

    Raises:
        StagingError: the folder cannot be written.
    """
    rows = count_rows(connection, table)
    if not rows:
        return None
    path = folder / "quarantine.parquet"
    select = f"select parse_filename(file) as file, row, reason from ({select_rows_out(table)})"
    try:
        with replace_whole(path) as draft:
            connection.execute(f"copy ({select}) to {quote_literal(str(draft))} (format parquet)")
    except (duckdb.Error, OSError) as exc:
        raise StagingError(
            f'Which rows of "{table}" are set aside cannot be written to {folder}: {exc}.',
            hint="Free disk space or make the folder writable, then resume the batch.",
        ) from exc
    return SetAside(table=table, rows=rows, reasons=count_reasons(connection, table), file=path)


def read_set_aside(connection: duckdb.DuckDBPyConnection, table: str, batch: str) -> SetAside | None:
    """Return which rows of *table* are in the lake's quarantine since *batch* was published; None when none is."""
    if not has_quarantine(connection, table):
        return None
    name = f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}"
    rows = connection.execute(f"select string_split({REASON}, '; ') from {name} where {BATCH} = ?", [batch]).fetchall()
    counts = Counter(str(name) for (names,) in rows for name in names)
    return SetAside(table=table, rows=len(rows), reasons=tuple(sorted(counts.items()))) if rows else None


def take_out(connection: duckdb.DuckDBPyConnection, increment: Increment, aside: SetAside) -> Increment:
    """Return *increment* without the rows of *aside*, which become the table ``quarantine_rows`` of the session.

    Raises:
        PublishConflict: the staged files are not those that were audited.
    """
    assert aside.file is not None  # only what is published already has none
    paths = ", ".join(f"({quote_literal(file.name)}, {quote_literal(str(file))})" for file in increment.files)
    connection.execute(
        "create or replace temp table quarantine_rows as select path as file, row, reason "
        f"from {read_parquet([aside.file])} join (values {paths}) as v(name, path) on file = name"
    )
    increment = replace(increment, out="temp.quarantine_rows")
    found = fetch_int(connection, f"select count(*) from ({increment.select_out()})")
    if found != aside.rows:
        raise PublishConflict(
            f'Of table "{increment.table}" {aside.rows} rows were to be set aside, and {found} were found.',
            hint="The staging was changed by hand: start a new batch.",
        )
    return increment


def remove_registered(connection: duckdb.DuckDBPyConnection, increment: Increment, files: Sequence[File]) -> None:
    """Delete the rows that are set aside from the table, for which *files* were registered in place of the staged."""
    paths = ", ".join(
        f"({quote_literal(str(staged))}, {quote_literal(str(file))})"
        for staged, file in zip(increment.files, files, strict=True)
    )
    connection.execute(
        f"delete from {increment.lake} as s where exists (from {increment.out} as o join (values {paths}) "
        "as v(staged, path) on o.file = v.staged where v.path = s.filename and o.row = s.file_row_number)"
    )


def publish_quarantine(
    connection: duckdb.DuckDBPyConnection, table: str, increment: Increment | None, publication: Publication
) -> None:
    """In the transaction that changed *table*: bring its quarantine up to date.

    None for *increment* says that the table was replaced, and no row of it set aside.
    """
    if increment is None or (increment.load.is_replaced and increment.out is None):
        drop_quarantine(connection, table)
        return
    at = quote_literal(publication.at.isoformat())
    stamp = (f"{quote_literal(publication.batch)} as {BATCH}", f"{at}::timestamptz as {SET_ASIDE_AT}")
    rows = increment.select_out(f"o.reason as {REASON}", *stamp) if increment.out else None
    if not increment.load.reads_all and has_quarantine(connection, table):
        is_changed = _copy_what_stays(connection, increment)
        if not is_changed and rows is None:
            return
        rows = f"from temp.quarantine_old union all by name {rows}" if rows else "from temp.quarantine_old"
    if rows is None or not fetch_int(connection, f"select count(*) from ({rows})"):
        drop_quarantine(connection, table)
        return
    connection.execute(f"create schema if not exists lake.{QUARANTINE_SCHEMA}")
    connection.execute(f"create or replace table lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)} as {rows}")


def _copy_what_stays(connection: duckdb.DuckDBPyConnection, increment: Increment) -> bool:
    """Make the table ``quarantine_old`` of what the quarantine keeps; return whether it differs from what is there.

    A row goes when the increment read another version of it. Where several rows of one key are in quarantine, nobody
    knows which of them was read: they go only when as many were. Rows without a key are known by all their values.
    """
    name = f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(increment.table)}"
    columns = increment.drift.columns
    before = list_columns(connection, name)
    present = {column: type_ for column, type_ in before.items() if column not in (REASON, BATCH, SET_ASIDE_AT)}
    connection.execute(
        "create or replace temp table quarantine_old as "
        f"select {select_columns(columns, present)}, {REASON}, {BATCH}, {SET_ASIDE_AT} from {name}"
    )
    key = increment.load.key
    if key:
        keys = ", ".join(map(quote_identifier, key))
        has_key = " and ".join(f"q.{quote_identifier(column)} is not null" for column in key)
        read = (
            f"(select *, count(*) over (partition by {keys}) as {COUNT} from ({increment.select_staged(is_all=True)}))"
        )
        old = f"(select {keys}, count(*) as {COUNT} from temp.quarantine_old group by {keys})"
        connection.execute(
            f"create or replace temp table quarantine_read as select n.* from {read} as n join {old} as q "
            f"on {is_same(key, 'n', 'q')} where n.{COUNT} >= q.{COUNT}"
        )
        connection.execute(
            f"delete from temp.quarantine_old as q where {has_key} "
            f"and exists (from temp.quarantine_read as n where {is_same(key, 'n', 'q')})"
        )
        connection.execute(
            f"delete from temp.quarantine_old as q where not ({has_key}) "
            f"and exists (from temp.quarantine_read as n where {is_same(columns, 'n', 'q')})"
        )
    if increment.key_files:
        connection.execute(
            "delete from temp.quarantine_old as q "
            f"where not exists (from ({increment.select_keys()}) as k where {is_same(key, 'k', 'q')})"
        )
    is_fewer = fetch_int(connection, "select count(*) from temp.quarantine_old") < fetch_int(
        connection, f"select count(*) from {name}"
    )
    return is_fewer or list_columns(connection, "temp.quarantine_old") != before


def drop_put_back(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """In a transaction: remove the rows from the quarantine of *table* that are not set aside (again)."""
    name = f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}"
    stays = f"exists (from {_FOUND} as q where q.tbl = {quote_literal(table)} and q.row = s.rowid)"
    connection.execute(f"delete from {name} as s where not {stays}")
    if not fetch_int(connection, f"select count(*) from {name}"):
        drop_quarantine(connection, table)


def select_quarantined(table: str) -> str:
    """Return the relation of the rows in quarantine, with what tells them apart as in a staged file."""
    name = quote_identifier(table)
    return (
        f"(select * exclude ({REASON}, {BATCH}, {SET_ASIDE_AT}), '' as filename, rowid as file_row_number "
        f"from lake.{QUARANTINE_SCHEMA}.{name})"
    )


def has_quarantine(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    return table in list_tables(connection, f"lake.{QUARANTINE_SCHEMA}")


def drop_quarantine(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """Drop the quarantine of *table*, if it has one."""
    if has_quarantine(connection, table):
        connection.execute(f"drop table lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}")


def _table_columns(connection: duckdb.DuckDBPyConnection, pool: Pool) -> dict[str, str]:
    columns = list_columns(connection, f"({pool.rows})")
    return {name: type_ for name, type_ in columns.items() if name not in (FILE, ROW)}
