"""The quarantine: rows that break a row-wise audit, set aside so that the rest of their table can be published.

``_quarantine.<table>`` of the lake has the columns of the table and why, in which batch and when a row was set aside.
A row is identified by what an audit returns: all columns of the table (then those rows that are equal to it in all of
them), or else the table's key. Within one file its number identifies it for good.

The rows of a table that can be set aside are a pool: those of its staged files, or those of its quarantine when they
are to come back (``phasewise.isolation`` says which).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from phasewise.errors import ProjectError, PublishConflict, StagingError
from phasewise.lake import quote_identifier, quote_literal
from phasewise.queries import fetch_int
from phasewise.snapshots import Publication, list_columns, list_tables
from phasewise.storage import StoredFile

QUARANTINE_SCHEMA = "_quarantine"
#: Columns of a quarantine's table besides those of the table itself.
REASON, BATCH, SET_ASIDE_AT = "_reason", "_batch", "_set_aside_at"
#: What tells the rows of a pool apart; no source has columns of these names.
FILE, ROW = "_phasewise_file", "_phasewise_row"
#: Where the audit that runs leaves its bad rows.
BAD_ROWS = "audit_bad_rows"

_FOUND = "memory.quarantine.found"
_FRESH = "memory.quarantine.fresh"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The rows of one table that can be set aside."""

    table: str
    key: tuple[str, ...]
    #: A SELECT of the table's columns and of ``FILE`` and ``ROW``.
    rows: str
    #: A relation of rows that belong to the table too, and stay; None: there are no others.
    fixed: str | None = None


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """The rows of one staged table that are to go into quarantine."""

    table: str
    rows: int
    #: Audit → rows that broke it; a row may have broken several.
    reasons: tuple[tuple[str, int], ...]
    #: Parquet: name of the staged file, number of the row in it, reason.
    file: Path

    def describe(self) -> str:
        noun = "row is" if self.rows == 1 else "rows are"
        return f"{self.rows} {noun} in quarantine: " + ", ".join(f"{name} {count}" for name, count in self.reasons)


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
        if clash := sorted(reserved & {column.casefold() for column in list_columns(connection, f"({pool.rows})")}):
            raise ProjectError(
                f'Rows of table "{pool.table}" cannot be set aside: it has a column "{clash[0]}", '
                "a name that the quarantine needs.",
                hint=f'Make its audits blocking, or leave the column out: [table."{pool.table}"] exclude.',
            )


def read_staged(files: str) -> str:
    """Return the rows of a pool of staged files, *files* being the table function over them."""
    return f'select *, filename as "{FILE}", file_row_number as "{ROW}" from {files}'


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
    is_same = " and ".join(f"p.{quote_identifier(name)} is not distinct from b.{quote_identifier(name)}" for name in by)
    strangers = fetch_int(
        connection, f"select count(*) from {BAD_ROWS} as b where not exists (from ({pool.rows}) as p where {is_same})"
    )
    if strangers:
        return f"it returns {strangers} rows that are not among those that can be set aside"
    connection.execute(
        f'insert into {_FRESH} select ?, p."{FILE}", p."{ROW}", ? from ({pool.rows}) as p '
        f"where exists (from {BAD_ROWS} as b where {is_same})",
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
    name = quote_literal(pool.table)
    is_out = f'q.tbl = {name} and q.file = p."{FILE}" and q.row = p."{ROW}"'
    stays = f"not exists (from {_FOUND} as q where {is_out})"
    rest = f'select * exclude ("{FILE}", "{ROW}") from ({pool.rows}) as p where {stays}'
    fixed = f"from {pool.fixed} union all by name " if pool.fixed else ""
    connection.execute(f"create or replace view memory.main.{quote_identifier(pool.table)} as {fixed}{rest}")


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
    fresh = folder / f".quarantine-{uuid.uuid4().hex}"
    select = f"select parse_filename(file) as file, row, reason from ({select_rows_out(table)})"
    try:
        connection.execute(f"copy ({select}) to {quote_literal(str(fresh))} (format parquet)")
        fresh.replace(path)
    except (duckdb.Error, OSError) as exc:
        fresh.unlink(missing_ok=True)
        raise StagingError(
            f'Which rows of "{table}" are set aside cannot be written to {folder}: {exc}.',
            hint="Free disk space or make the folder writable, then resume the batch.",
        ) from exc
    return SetAside(table=table, rows=rows, reasons=count_reasons(connection, table), file=path)


def publish_quarantine(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    files: Mapping[str, Path | StoredFile],
    aside: SetAside | None,
    publication: Publication,
) -> None:
    """In the transaction that replaced *table*: move the rows of *aside* into quarantine, in place of what was there.

    *files* has, by the name of each staged file, the file that was registered for it.

    Raises:
        PublishConflict: the registered files are not those that were audited.
    """
    if aside is None:
        drop_quarantine(connection, table)
        return
    paths = ", ".join(f"({quote_literal(name)}, {quote_literal(str(path))})" for name, path in files.items())
    connection.execute(
        "create or replace temp table quarantine_rows as select path, row, reason "
        f"from read_parquet({quote_literal(str(aside.file))}) join (values {paths}) as v(file, path) using (file)"
    )
    connection.execute(f"create schema if not exists lake.{QUARANTINE_SCHEMA}")
    name = quote_identifier(table)
    is_out = "q.path = s.filename and q.row = s.file_row_number"
    at = quote_literal(publication.at.isoformat())
    stamp = f"{quote_literal(publication.batch)} as {BATCH}, {at}::timestamptz as {SET_ASIDE_AT}"
    connection.execute(
        f"create or replace table lake.{QUARANTINE_SCHEMA}.{name} as select s.*, q.reason as {REASON}, {stamp} "
        f"from lake.main.{name} as s join quarantine_rows as q on {is_out}"
    )
    moved = fetch_int(connection, f"select count(*) from lake.{QUARANTINE_SCHEMA}.{name}")
    removed = fetch_int(
        connection, f"delete from lake.main.{name} as s where exists (from quarantine_rows as q where {is_out})"
    )
    if not moved == removed == aside.rows:
        raise PublishConflict(
            f'Of table "{table}" {aside.rows} rows were to be set aside, and {moved} were found.',
            hint="The staging was changed by hand: start a new batch.",
        )


def put_back(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """In a transaction: move the rows of the quarantine of *table* that are not set aside (again) into the table."""
    name = quote_identifier(table)
    stays = f"exists (from {_FOUND} as q where q.tbl = {quote_literal(table)} and q.row = s.rowid)"
    connection.execute(
        f"insert into lake.main.{name} by name select s.* exclude ({REASON}, {BATCH}, {SET_ASIDE_AT}) "
        f"from lake.{QUARANTINE_SCHEMA}.{name} as s where not {stays}"
    )
    connection.execute(f"delete from lake.{QUARANTINE_SCHEMA}.{name} as s where not {stays}")
    if not fetch_int(connection, f"select count(*) from lake.{QUARANTINE_SCHEMA}.{name}"):
        drop_quarantine(connection, table)


def drop_quarantine(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """Drop the quarantine of *table*, if it has one."""
    if table in list_tables(connection, f"lake.{QUARANTINE_SCHEMA}"):
        connection.execute(f"drop table lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}")


def _table_columns(connection: duckdb.DuckDBPyConnection, pool: Pool) -> dict[str, str]:
    columns = list_columns(connection, f"({pool.rows})")
    return {name: type_ for name, type_ in columns.items() if name not in (FILE, ROW)}
