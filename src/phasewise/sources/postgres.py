"""PostgreSQL as a source: ``postgresql://user:password@host:5432/database?schema=sales``.

The parameters are libpq's, and ``schema`` (default ``public``), which is ours. Tables of plain columns are scanned
in parallel, by ranges of pages. Any other table (see ``PLAIN``), a partitioned one and a view are read through one
query, in which the server prints what has no faithful type. Values that the binary scan would change without a word
(a numeric NaN arrives as 0, a timestamp after 294246 wraps) are counted by the server at the same snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from phasewise.errors import SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.lake.credentials import lend_password
from phasewise.lake.object_store import File
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.refusals import POSTGRES_ADVICE
from phasewise.lake.session import use_one_thread
from phasewise.project.urls import read_database_url
from phasewise.settings import Settings
from phasewise.sources.databases import ServerSource
from phasewise.sources.decoding import explain_unfaithful
from phasewise.sources.protocol import Column, SnapshotToken, SourceTable, StagedRows
from phasewise.sources.ranges import Dialect, divide, divide_by_values, find_bounds

#: PostgreSQL's internal type name → the lake's type, where the binary scan keeps every value.
PLAIN = {
    "int2": "SMALLINT",
    "int4": "INTEGER",
    "int8": "BIGINT",
    "float4": "FLOAT",
    "float8": "DOUBLE",
    "bool": "BOOLEAN",
    "text": "VARCHAR",
    "varchar": "VARCHAR",
    "bpchar": "VARCHAR",
    "name": "VARCHAR",
    "uuid": "UUID",
    "bytea": "BLOB",
    "date": "DATE",
    "time": "TIME",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMP WITH TIME ZONE",
}
_CURSOR_MOMENTS = {"DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"}
#: Types that are text by nature: printed by the server, and nothing to remark.
TEXTS = {"json", "jsonb", "xml", "citext"}
_DECIMAL = re.compile(r"(?:numeric|DECIMAL)\((\d+),(-?\d+)\)")

# Everything is printed as text, so that no catalogue type meets the scanner's own mapping.
_CATALOGUE = """
SELECT c.relname::text AS relation, c.relkind::text AS kind, c.relispartition AS is_partition,
       c.relhassubclass AS has_children, a.attname::text AS name,
       CASE WHEN c.relpages = 0 AND current_setting('server_version_num')::int < 140000
            THEN -1 ELSE c.reltuples END::bigint AS estimate,
       format_type(coalesce(nullif(t.typbasetype, 0), a.atttypid),
                   CASE WHEN t.typbasetype <> 0 THEN t.typtypmod ELSE a.atttypmod END) AS base,
       format_type(a.atttypid, a.atttypmod) AS declared, coalesce(b.typname, t.typname)::text AS type_name,
       coalesce(b.typtype, t.typtype)::text AS type_kind, t.typtype = 'b' AS is_base, a.attnotnull AS is_required,
       coalesce(array_position(i.indkey::int2[], a.attnum), -1)::int AS key_position
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = {schema}
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_type b ON b.oid = t.typbasetype AND t.typbasetype <> 0
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
ORDER BY c.relname, a.attnum
"""
_PAGES = """
SELECT (pg_relation_size({table}::regclass) / current_setting('block_size')::int)::bigint AS pages,
       pg_relation_filenode({table}::regclass)::bigint AS filenode,
       current_setting('server_version_num')::int AS version
"""
# Of each stretch of pages one is counted, at a place that differs from stretch to stretch: a table may have a pattern.
_ROWS_OF_PAGES = """
SELECT start::bigint AS start, (SELECT count(*) FROM {rows}) AS rows
FROM (SELECT start, least(start + (hashint8(start::bigint) & 2147483647) % {step}, {pages} - 1) AS page
      FROM generate_series(0, {pages} - 1, {step}) AS start) AS sampled
"""
#: A page of 8 KiB holds no more rows, nor does a larger one by more than its size.
_MAX_ROWS_OF_PAGE = 291
#: Pages whose rows are counted to find out where a table is to be divided; of a smaller table all are.
_SAMPLE_PAGES = 4096


@dataclass(frozen=True, kw_only=True)
class _Relation:
    table: SourceTable
    #: r a table, p a partitioned one, v and m views, f a foreign table.
    kind: str
    is_partition: bool
    has_children: bool
    #: Whether the scanner keeps every value of every column, but for those that ``count_rows`` looks for.
    is_plain: bool


class PostgresSource(ServerSource):
    """One schema of a PostgreSQL database."""

    kind = "PostgreSQL"
    extensions = ("postgres_scanner",)
    query_function = "postgres_query"
    advice = POSTGRES_ADVICE

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        super().__init__(url, settings)
        parts = read_database_url(url, "postgresql://user@host:5432/database")
        options = {
            "schema": "public",
            "connect_timeout": str(max(2, round(settings.connect_timeout))),  # libpq takes no less than 2
            "application_name": "phasewise",
            **parts.options,
            # The scanner takes each text for UTF-8, whatever the database or PGCLIENTENCODING says.
            "client_encoding": "UTF8",
        }
        self._schema = options.pop("schema")
        self._dsn, self._password = parts.write("postgresql", options), parts.password
        self._relations: dict[str, _Relation] | None = None

    def list_tables(self) -> list[str]:
        return sorted(
            name
            for name, relation in self._read_catalogue().items()
            if relation.kind in "rp" and not relation.is_partition
        )

    def describe_table(self, name: str) -> SourceTable:
        relation = self._read_catalogue().get(name)
        if relation is None:
            tables = self.list_tables()
            raise TableMissing(
                name, hint=f'Looked in schema "{self._schema}" of {self.url}. It has: {", ".join(tables[:40])}.'
            )
        return relation.table

    def can_carry(self, column: Column, type_name: str) -> bool:
        if type_name == "VARCHAR":
            return True
        return column.source_type.startswith("numeric") and type_name.startswith("DECIMAL")

    @contextmanager
    def open_snapshot(self, folder: Path) -> Iterator[SnapshotToken]:
        """Hold a transaction open whose snapshot the other processes enter."""
        with self._open() as connection:
            self._begin(connection)
            # An open transaction keeps the server from cleaning up: it ends a holder that never lets go.
            milliseconds = min(round(self._settings.source_snapshot_hours * 3_600_000), 2**31 - 1)
            _execute(connection, f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}")
            row = connection.execute(self._query("SELECT pg_export_snapshot() AS id")).fetchone()
            assert row is not None  # a function call has a row
            yield {"id": row[0]}

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        # The scanner quotes the whole DSN in its messages, also later when a scan thread connects. libpq takes
        # the password from the environment, where no message finds it.
        lend_password("PGPASSWORD", self._password)
        schema = quote_literal(self._schema)
        try:
            connection.execute(
                f"ATTACH {quote_literal(self._dsn)} AS source (TYPE postgres, READ_ONLY, SCHEMA {schema})"
            )
        except duckdb.Error as exc:
            raise self._explain_refusal(exc) from exc
        self._attached = connection

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        try:
            self._begin(connection, snapshot["id"] if snapshot else None)
        except duckdb.Error as exc:
            raise SourceUnavailable(
                f"The snapshot of {self.url} that the batch holds cannot be entered: {exc}",
                hint="The process that held it has ended. Start the batch again.",
            ) from exc

    def select(self, table: SourceTable) -> str:
        if self._is_scanned(table):
            names = ", ".join(quote_identifier(column.name) for column in table.columns)
            return f"SELECT {names} FROM source.{self._qualify(table)}"
        if self._attached is not None:
            use_one_thread(self._attached)
        printed = ", ".join(f"{_print_column(column)} AS {quote_identifier(column.name)}" for column in table.columns)
        return self._query(f"SELECT {printed} FROM {self._qualify(table)}{table.where()}")

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        name = quote_identifier(column.name)
        if operator == "IS NULL":
            return f"{name} IS NULL"
        text = quote_literal(mark.replace(" (BC)", " BC"))
        if column.type == "VARCHAR":
            return f'{name}::text COLLATE "C" {operator} {text}'
        if column.type in _CURSOR_MOMENTS:
            return f"{name} {operator} {text}::{column.type.lower()}"
        return f"{name} {operator} {mark}"

    def count_rows(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, staged: StagedRows | None = None
    ) -> int:
        use_one_thread(connection)  # for one query: a second thread would wait for it, and take the server's core
        tests = [(column, test) for column in table.columns if (test := _test_unfaithful(column))]
        if staged is not None:
            suspects = _find_suspects(connection, [column for column, _ in tests], staged.file)
            tests = [(column, test) for column, test in tests if column.name in suspects]
        counts = ["count(*) AS c0"]
        counts += [f"count(*) FILTER (WHERE {test}) AS c{index}" for index, (_, test) in enumerate(tests, start=1)]
        query = f"SELECT {', '.join(counts)} FROM {self._qualify(table)}{table.where()}"
        row = connection.execute(self._query(query)).fetchone()
        assert row is not None  # an aggregate has a row
        for (column, test), count in zip(tests, row[1:], strict=True):
            if count:
                raise self._explain_unfaithful(connection, table, column, test, count)
        return int(row[0])

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide by pages, so that each partition reads its own alone; a partitioned table by its key,
        or its cursor.

        Pages are divided evenly by their rows, not by their number: those of a table from which much was deleted are
        half empty.
        """
        relation = self._read_catalogue()[table.name]
        if relation.kind not in "rp":
            return []
        name = quote_literal(self._qualify(table))
        pages, filenode, version = connection.execute(self._query(_PAGES.format(table=name))).fetchall()[0]
        if relation.kind == "p" or relation.has_children or version < 140000:  # no range of pages was scanned alone
            return self._split_by_values(connection, table, limit)
        if pages * _MAX_ROWS_OF_PAGE <= limit:
            return []
        step = -(-pages // _SAMPLE_PAGES)
        rows = self._qualify(table) + table.where(
            "ctid >= format('(%s,0)', page)::tid", "ctid < format('(%s,0)', page + 1)::tid"
        )
        query = self._query(_ROWS_OF_PAGES.format(rows=rows, pages=pages, step=step))
        blocks = [(start, count * step) for start, count in connection.execute(query).fetchall()]
        bounds = [[f"'({page},0)'::tid"] for page in find_bounds(sorted(blocks), limit)]
        # A table that is written again (VACUUM FULL) while its partitions are read has its rows in other pages: a
        # partition then finds none at all, and the sum of all is not what the table had.
        same = f"pg_relation_filenode({name}::regclass) = {filenode}"
        return [f"{same} AND {condition}" for condition in divide(["ctid"], bounds)]

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        try:
            self.count_rows(connection, table)
        except UnfaithfulValue as found:
            return found
        return None

    def _begin(self, connection: duckdb.DuckDBPyConnection, snapshot: str | None = None) -> None:
        connection.execute("BEGIN TRANSACTION")
        if snapshot is not None:
            _execute(connection, f"SET TRANSACTION SNAPSHOT {quote_literal(snapshot)}")
        # What the server prints must not depend on its configuration.
        _execute(
            connection,
            "SET LOCAL datestyle = 'ISO, YMD'; SET LOCAL intervalstyle = 'postgres'; SET LOCAL timezone = 'UTC'; "
            "SET LOCAL extra_float_digits = 1; SET LOCAL bytea_output = 'hex'; SET LOCAL lc_monetary = 'C'; "
            "SET LOCAL idle_in_transaction_session_timeout = 0",
        )
        # A server notices that its client is gone when it writes to it, which a long query may not do for hours.
        # From version 14 on, on Linux, it can look.
        _execute(
            connection,
            "DO $$ BEGIN PERFORM set_config('client_connection_check_interval', '2s', true); "
            "EXCEPTION WHEN OTHERS THEN NULL; END $$",
        )

    def _read_catalogue(self) -> dict[str, _Relation]:
        if self._relations is None:
            with self._open() as connection:
                query = _CATALOGUE.format(schema=quote_literal(self._schema))
                result = connection.execute(self._query(query))
                names = [column[0] for column in result.description or ()]
                rows = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
            grouped: dict[str, list[dict[str, object]]] = {}
            for row in rows:
                grouped.setdefault(str(row["relation"]), []).append(row)
            self._relations = {name: _describe_relation(name, group) for name, group in grouped.items()}
        return self._relations

    def _is_scanned(self, table: SourceTable) -> bool:
        # The scanner divides a table by its pages; a parent's rows lie in the pages of its children.
        relation = self._read_catalogue()[table.name]
        # The scanner's own conditions are SQL of DuckDB, and those of the table are the server's.
        is_natural = not table.conditions and set(table.columns) <= set(relation.table.columns)
        return is_natural and relation.is_plain and relation.kind == "r" and not relation.has_children

    def _split_by_values(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        relation = self._qualify(table) + table.where()
        rows = connection.execute(self._query(f"SELECT count(*) AS rows FROM {relation}")).fetchall()[0][0]
        dialect = Dialect(
            quote=quote_identifier,
            show=lambda value: f"quote_literal({value}::text)",
            literal=lambda _, printed: printed,
            fetch=lambda query: connection.execute(self._query(query)).fetchall(),
        )
        return divide_by_values(dialect, table, relation, rows=rows, limit=limit)

    def _qualify(self, table: SourceTable) -> str:
        return f"{quote_identifier(self._schema)}.{quote_identifier(table.name)}"

    def _explain_unfaithful(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, column: Column, test: str, count: int
    ) -> UnfaithfulValue:
        names = table.key or ("ctid",)
        shown = ", ".join(
            f"{quote_identifier(name)}::text AS c{index}" for index, name in enumerate([column.name, *names])
        )
        query = f"SELECT {shown} FROM {self._qualify(table)}{table.where(test)} LIMIT 1"
        sample = connection.execute(self._query(query)).fetchone() or (None,) * (len(names) + 1)
        return explain_unfaithful(table.name, column, names, sample, count=count)


def _execute(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    connection.execute(f"CALL postgres_execute('source', {quote_literal(sql)})")


def _describe_relation(name: str, rows: list[dict[str, object]]) -> _Relation:
    columns = [row for row in rows if row["name"] is not None]
    key = sorted((int(str(row["key_position"])), str(row["name"])) for row in columns if row["key_position"] != -1)
    estimate = int(str(rows[0]["estimate"]))
    table = SourceTable(
        name=name,
        columns=tuple(_describe_column(row) for row in columns),
        key=tuple(column for _, column in key),
        row_estimate=estimate if estimate >= 0 else None,  # -1: never analysed; 0 before version 14
    )
    return _Relation(
        table=table,
        kind=str(rows[0]["kind"]),
        is_partition=bool(rows[0]["is_partition"]),
        has_children=bool(rows[0]["has_children"]),
        is_plain=all(
            row["is_base"] and (row["type_name"] in PLAIN or column.type != "VARCHAR")
            for row, column in zip(columns, table.columns, strict=True)
        ),
    )


def _describe_column(row: dict[str, object]) -> Column:
    declared, type_name = str(row["declared"]), str(row["type_name"])
    lake_type, note = find_type(type_name, str(row["base"]), declared, is_enum=row["type_kind"] == "e")
    is_nullable = not row["is_required"]
    return Column(name=str(row["name"]), source_type=declared, type=lake_type, nullable=is_nullable, note=note)


def find_type(type_name: str, base: str, declared: str, *, is_enum: bool = False) -> tuple[str, str | None]:
    """Return the lake's type for a type of PostgreSQL, and a note where the column is printed as text."""
    if type_name in PLAIN:
        return PLAIN[type_name], None
    if type_name in TEXTS:
        return "VARCHAR", None
    if type_name == "numeric":
        if match := _DECIMAL.fullmatch(base):
            precision, scale = int(match[1]), int(match[2])
            if precision <= 38 and 0 <= scale <= precision:
                return f"DECIMAL({precision},{scale})", None
        return "VARCHAR", f"carried as text: no decimal type of the warehouse holds every {declared}"
    if is_enum:
        return "VARCHAR", f"carried as text: the warehouse has no enum ({declared})"
    return "VARCHAR", f"carried as text: the warehouse has no type {declared}"


def _print_column(column: Column) -> str:
    name = quote_identifier(column.name)
    if column.type == "VARCHAR":
        return f"{name}::text"
    if match := _DECIMAL.fullmatch(column.type):
        return f"{name}::numeric({match[1]},{match[2]})"
    return name


def _find_suspects(connection: duckdb.DuckDBPyConnection, columns: Sequence[Column], file: File) -> set[str]:
    """Return the names of those *columns* that may show another value, by the bounds of their row groups in *file*.

    A NaN shows as 0. A timestamp that wraps shows as one before all those that PostgreSQL has.
    """
    # Only what is said to be clear is: a bound that is missing or cannot be read is suspect.
    tests = [f"WHEN {quote_literal(column.name)} THEN {_find_clear(column)}" for column in columns]
    if not tests:
        return set()
    is_clear = f"stats_null_count = num_values OR CASE path_in_schema {' '.join(tests)} END"
    found = connection.execute(
        f"SELECT path_in_schema FROM parquet_metadata({quote_literal(str(file))}) "
        f"GROUP BY path_in_schema HAVING NOT bool_and(coalesce({is_clear}, false))"
    ).fetchall()
    return {column.name for column in columns} & {name for (name,) in found}


def _find_clear(column: Column) -> str:
    """Return a condition on the bounds of a row group that holds where no value of *column* shows as another there."""
    if column.type.startswith("TIMESTAMP"):
        return "TRY_CAST(stats_min_value AS TIMESTAMP) >= TIMESTAMP '4714-01-01 (BC) 00:00:00'"
    if column.note is None:
        return "TRY_CAST(stats_min_value AS DOUBLE) > 0 OR TRY_CAST(stats_max_value AS DOUBLE) < 0"
    return "false"  # what the server rounded to fit may be anything


def _test_unfaithful(column: Column) -> str | None:
    """Return a condition, for the server, that holds where the lake would show another value; None: nowhere."""
    name = quote_identifier(column.name)
    if match := _DECIMAL.fullmatch(column.type):
        if column.note is None:
            return f"{name} = 'NaN'"  # a numeric with a precision has no infinity
        digits = int(match[1]) - int(match[2])
        is_special = f"{name}::text IN ('NaN', 'Infinity', '-Infinity')"
        return f"{is_special} OR {name} <> round({name}, {match[2]}) OR abs({name}) >= 1e{digits}"
    if column.type.startswith("TIMESTAMP"):
        return f"{name} >= '294247-01-01' AND {name} <> 'infinity'"
    return None
