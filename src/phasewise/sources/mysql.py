"""MySQL and MariaDB as a source: ``mysql://user:password@host:3306/database``.

Everything is read by queries that the server answers, never through the scanner's own catalogue: that one breaks on
a backtick in a name, hides a table behind another that differs by case, makes every ``TINYINT(1)`` a boolean, shows
the date 0000-00-00 as NULL and a wide decimal as a double. Moments travel as text and are decoded with a check.

One moment for all tables is held by connections that are lent (``mysql_snapshot``). Where that cannot be, DuckDB's pool
of connections ends a transaction between two queries, so one query is one moment: the rows of a table are consistent,
several tables are not.
"""

from __future__ import annotations

import platform
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import duckdb

from phasewise.errors import ProjectError, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.lake.credentials import lend_password
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.refusals import find_reason
from phasewise.lake.session import use_one_thread
from phasewise.project.urls import read_database_url, redact_url
from phasewise.settings import Settings
from phasewise.sources.databases import ServerSource
from phasewise.sources.decoding import MOMENTS, decode_text, explain_unfaithful, fail_where_null
from phasewise.sources.mysql_snapshot import Login, NoSnapshot, lend_snapshot
from phasewise.sources.protocol import Column, SnapshotToken, SourceTable, StagedRows
from phasewise.sources.ranges import Dialect, divide_by_values

#: MySQL's type name → the lake's type; integers have an unsigned sister (``U`` before the name).
PLAIN = {
    "tinyint": "TINYINT",
    "smallint": "SMALLINT",
    "mediumint": "INTEGER",
    "int": "INTEGER",
    "bigint": "BIGINT",
    "year": "INTEGER",
    "float": "FLOAT",
    "double": "DOUBLE",
    "date": "DATE",
    "datetime": "TIMESTAMP",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
    **dict.fromkeys(("char", "varchar", "tinytext", "text", "mediumtext", "longtext", "json"), "VARCHAR"),
    **dict.fromkeys(("binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"), "BLOB"),
    "uuid": "UUID",
}
_SPATIAL = {"geometry", "point", "linestring", "polygon", "multipoint", "multilinestring", "multipolygon"}
_SPATIAL |= {"geometrycollection", "geomcollection"}
_EXACT = re.compile(r"U?(?:TINYINT|SMALLINT|INTEGER|BIGINT)|DECIMAL\(\d+,\d+\)")
_INTEGERS = {"tinyint", "smallint", "mediumint", "int", "bigint"}

_SETTINGS = {
    "mysql_session_time_zone": "+00:00",
    "mysql_tinyint1_as_boolean": False,
    "mysql_bit1_as_boolean": False,
    # A limit on the time of a query is no safety for an extraction: it would end it in the middle.
    "mysql_query_timeout_enabled": False,
}

_TABLES = """
SELECT table_name AS name, table_type AS kind, cast(coalesce(table_rows, -1) AS signed) AS estimate
FROM information_schema.tables
WHERE table_schema = database() AND table_type IN ('BASE TABLE', 'SYSTEM VERSIONED', 'VIEW')
"""
_COLUMNS = """
SELECT c.column_name AS name, c.column_type AS declared, c.data_type AS type_name,
       c.is_nullable = 'YES' AS is_nullable, cast(coalesce(k.ordinal_position, 0) AS signed) AS key_position
FROM information_schema.columns c
LEFT JOIN information_schema.key_column_usage k
  ON k.table_schema = c.table_schema AND k.table_name = c.table_name AND k.column_name = c.column_name
  AND k.constraint_name = 'PRIMARY'
WHERE c.table_schema = database() AND binary c.table_name = {table}
ORDER BY c.ordinal_position
"""


class MysqlSource(ServerSource):
    """One database of a MySQL or MariaDB server."""

    kind = "MySQL"
    extensions = ("mysql_scanner",)
    query_function = "mysql_query"
    advice: Mapping[str, str] = MappingProxyType(
        {"TLS/SSL error": "Let ssl_ca name the certificate of the authority that signed the server's."}
    )

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        super().__init__(url, settings)
        self._dsn, self._login = _read_url(url, settings.connect_timeout)
        self._count_before: int | None = None

    def list_tables(self) -> list[str]:
        with self._open() as connection:
            rows = connection.execute(self._query(_TABLES)).fetchall()
        return sorted(str(name) for name, kind, _ in rows if kind != "VIEW")

    def describe_table(self, name: str) -> SourceTable:
        with self._open() as connection:
            estimates = {row[0]: row[2] for row in connection.execute(self._query(_TABLES)).fetchall()}
            if name not in estimates:
                raise TableMissing(name, hint=f"Looked in {self.url}. It has: {', '.join(sorted(estimates)[:40])}.")
            rows = connection.execute(self._query(_COLUMNS.format(table=_quote_text(name)))).fetchall()
        key = sorted((position, column) for column, *_, position in rows if position)
        return SourceTable(
            name=name,
            columns=tuple(describe_column(*row[:4]) for row in rows),
            key=tuple(column for _, column in key),
            row_estimate=int(estimates[name]) if estimates[name] >= 0 else None,
        )

    def can_carry(self, column: Column, type_name: str) -> bool:
        if type_name == "VARCHAR":
            return column.type != "BLOB"
        return type_name == "BOOLEAN" and column.source_type == "tinyint(1)"

    @contextmanager
    def open_snapshot(self, folder: Path) -> Iterator[SnapshotToken | None]:
        """Hold the moment with as many connections as tables are read at the same time."""
        seconds = self._settings.source_snapshot_hours * 3600
        lent = lend_snapshot(self._login, connections=self._settings.table_concurrency, idle_seconds=seconds)
        with ExitStack() as stack:
            try:
                moment = stack.enter_context(lent)
                token = {
                    "id": f"lent-{uuid.uuid4().hex}",
                    "socket": str(moment.socket),
                    "machine": platform.node(),
                    "without": list(moment.without),
                    "remark": moment.slowed_by and f"the tables are read one after another: {moment.slowed_by}",
                }
            except NoSnapshot as exc:
                token = {"id": None, "remark": f"no moment of the source could be held for all tables: {exc}"}
            yield token

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        lent = {"mysql_pool_size": 1, "mysql_pool_acquire_mode": "wait"} if snapshot else {}
        for name, value in (_SETTINGS | lent).items():
            connection.execute(f"SET {name} = {quote_literal(value) if isinstance(value, str) else value}")
        use_one_thread(connection)
        # The scanner quotes the whole DSN in its messages; the client library takes the password from here.
        lend_password("MYSQL_PWD", self._login.password)
        dsn = self._name_lent(snapshot["socket"]) if snapshot else self._dsn
        try:
            connection.execute(f"ATTACH {quote_literal(dsn)} AS source (TYPE mysql, READ_ONLY)")
            connection.execute(self._query("SELECT 1 AS one")).fetchone()
        except duckdb.Error as exc:
            if snapshot:
                raise SourceUnavailable(
                    f"The snapshot of {self.url} that the batch holds cannot be entered: {find_reason(exc)}.",
                    hint="The process that held it has ended, or the server ended its connections. Start a new batch.",
                ) from exc
            raise self._explain_refusal(exc) from exc
        self._attached = connection

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        super().begin(connection, table)
        self._count_before = None if snapshot else self._count(connection, table)

    def select(self, table: SourceTable) -> str:
        decoded = ", ".join(
            f"{_decode_or_fail(column, f'c{index}')} AS {quote_identifier(column.name)}"
            for index, column in enumerate(table.columns)
        )
        return f"SELECT {decoded} FROM ({self._read_printed(table)})"

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        name = _quote_name(column.name)
        if operator == "IS NULL":
            return f"{name} IS NULL"
        if column.type == "VARCHAR":  # by bytes, not by a collation
            value, text = f"convert({name} using utf8mb4)", f"convert({_quote_text(mark)} using utf8mb4)"
            return f"cast({value} as binary) {operator} cast({text} as binary)"
        if column.type in MOMENTS:  # the session's time zone is UTC
            kind = "date" if column.type == "DATE" else "datetime(6)"
            return f"{name} {operator} cast({_quote_text(mark.removesuffix('+00'))} as {kind})"
        return f"{name} {operator} {mark}"

    def count_rows(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, staged: StagedRows | None = None
    ) -> int:
        """Return the rows at the moment that is held; without one as many as were read, between two counts."""
        before, after = self._count_before, self._count(connection, table)
        if staged is not None and before is not None and min(before, after) <= staged.rows <= max(before, after):
            return staged.rows
        return after

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide by the key, else by the cursor."""
        dialect = Dialect(
            quote=_quote_name,
            show=lambda value: f"cast({value} AS char)",
            literal=_print_literal,
            fetch=lambda query: connection.execute(self._query(query)).fetchall(),
        )
        relation = f"{_quote_name(table.name)}{table.where()}"
        return divide_by_values(dialect, table, relation, rows=self._count(connection, table), limit=limit)

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        names = [column.name for column in table.columns]
        for index, column in enumerate(table.columns):
            value = f"c{index}"
            bad = f"FROM ({self._read_printed(table)}) WHERE {value} IS NOT NULL AND ({_decode(column, value)}) IS NULL"
            count = fetch_int(connection, f"SELECT count(*) {bad}")
            if not count:
                continue
            keys = [f"c{names.index(name)}" for name in table.key]
            sample = connection.execute(f"SELECT {', '.join([value, *keys])} {bad} LIMIT 1").fetchone()
            assert sample is not None  # it was counted above
            return explain_unfaithful(table.name, column, table.key, sample, count=count)
        return None

    def _count(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> int:
        query = f"SELECT count(*) AS n FROM {_quote_name(table.name)}{table.where()}"
        return fetch_int(connection, self._query(query))

    def _read_printed(self, table: SourceTable) -> str:
        """Return a relation with the columns c0, c1, …, printed by the server where only text is faithful."""
        printed = ", ".join(f"{_print(column)} AS c{index}" for index, column in enumerate(table.columns))
        return self._query(f"SELECT {printed} FROM {_quote_name(table.name)}{table.where()}")

    def _name_lent(self, socket: str) -> str:
        # Where the socket does not answer the scanner tries 127.0.0.1 instead, which would be another moment: port 1.
        return f"mysql://localhost:1/{quote(self._login.database, safe='')}?socket={quote(socket, safe='')}"


def _read_url(url: str, timeout: float) -> tuple[str, Login]:
    """Return DSN without password, and all that it takes to log in."""
    example = "mysql://user@host:3306/database"
    parts = read_database_url(url, example)
    (host, port), *others = parts.servers
    if not host or others:
        problem = "several servers" if others else "no server"
        raise ProjectError(f'"{redact_url(url)}" names {problem}.', hint=f"Write {example}.")
    options = {name.replace("-", "_"): value for name, value in parts.options.items()}
    # The scheme may be mariadb. In a URL the scanner knows ssl-mode and the like by these names alone.
    dsn = parts.write("mysql", {name.replace("_", "-"): value for name, value in options.items()})
    return dsn, Login(
        host=host,
        port=int(port or 3306),
        user=parts.user or "",
        password=parts.password,
        database=parts.database,
        options=options,
        connect_timeout=timeout,
    )


def _quote_name(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _quote_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _print_literal(column: Column, value: str) -> str:
    # A decimal and a text are compared as doubles.
    return str(value) if _EXACT.fullmatch(column.type) else _quote_text(str(value))


def describe_column(name: str, declared: str, type_name: str, is_nullable: int) -> Column:
    lake_type, note = _find_type(declared, type_name)
    return Column(name=name, source_type=declared, type=lake_type, nullable=bool(is_nullable), note=note)


def _find_type(declared: str, type_name: str) -> tuple[str, str | None]:
    """Return the lake's type for a type of MySQL, and a note where it is not of the same kind."""
    type_name = type_name.lower()
    if type_name in _INTEGERS:
        return ("U" if "unsigned" in declared else "") + PLAIN[type_name], None
    if type_name in PLAIN:
        return PLAIN[type_name], None
    if match := re.match(r"decimal\((\d+),(\d+)\)", declared):
        if int(match[1]) <= 38:
            return f"DECIMAL({match[1]},{match[2]})", None
        return "VARCHAR", f"carried as text: no decimal type of the warehouse holds every {declared}"
    if type_name == "bit":
        return ("BOOLEAN", None) if declared == "bit(1)" else ("BLOB", f"the bytes of {declared}")
    if type_name in _SPATIAL:
        return "BLOB", "MySQL's own bytes: SRID and WKB"
    return "VARCHAR", f"carried as text: the warehouse has no type {declared}"


def _print(column: Column) -> str:
    name = _quote_name(column.name)
    natural, _ = _find_type(column.source_type, column.source_type.partition("(")[0].partition(" ")[0])
    if column.source_type.startswith("timestamp"):
        return f"concat(cast({name} AS char), '+00')"  # the session's time zone is UTC
    if natural.startswith("DECIMAL") or natural in {"VARCHAR", "DATE", "TIMESTAMP", "UUID"}:
        return f"cast({name} AS char)"
    return f"{name} + 0" if column.source_type == "bit(1)" else name


def _decode_or_fail(column: Column, value: str) -> str:
    if column.type in MOMENTS or column.type in {"UUID", "BOOLEAN"}:
        return fail_where_null(_decode(column, value), value, column.type)
    return _decode(column, value)


def _decode(column: Column, value: str) -> str:
    if column.type in MOMENTS or column.type == "UUID":
        return decode_text(column.type, value)
    if column.type == "BOOLEAN":
        return f"CASE {value} WHEN 0 THEN false WHEN 1 THEN true END"
    return f"CAST({value} AS {column.type})"
