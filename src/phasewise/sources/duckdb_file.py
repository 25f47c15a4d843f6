"""A DuckDB database file as a source: ``duckdb:///relative.duckdb?schema=main``, ``duckdb:////absolute.duckdb``.

Types that Parquet or the lake cannot hold exactly (HUGEINT would become a double, INTERVAL would lose microseconds,
TIMETZ its zone) are carried as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from phasewise.errors import SourceUnavailable, TableMissing
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.project.urls import find_local_path, read_options
from phasewise.settings import Settings
from phasewise.sources.databases import DuckdbReader
from phasewise.sources.protocol import Column, SnapshotToken, SourceTable
from phasewise.sources.ranges import divide, find_bounds

_PLAIN = re.compile(
    r"BOOLEAN|U?TINYINT|U?SMALLINT|U?INTEGER|U?BIGINT|FLOAT|DOUBLE|DECIMAL\(\d+,\d+\)|VARCHAR|BLOB|UUID|DATE|TIME"
    r"|TIMESTAMP|TIMESTAMP WITH TIME ZONE"
)

#: Rows of a vector, and so the shortest stretch that a scan can skip.
BLOCK_ROWS = 2048


def _find_lake_type(declared: str) -> tuple[str, str | None]:
    """Return the lake's type for a type of DuckDB, and a note where the column is carried as text."""
    if _PLAIN.fullmatch(declared):
        return declared, None
    if declared == "JSON":
        return "VARCHAR", None
    return "VARCHAR", f"carried as text: Parquet and the warehouse do not hold every {declared} exactly"


def compare_typed(value: str, type_name: str, operator: str, mark: str) -> str:
    """Return a comparison, in DuckDB's SQL, of *value* with *mark*."""
    return f"{value} {operator}" + ("" if operator == "IS NULL" else f" CAST({quote_literal(mark)} AS {type_name})")


class DuckdbSource(DuckdbReader):
    """One schema of a DuckDB file."""

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        super().__init__(url, settings)
        self._path = find_local_path(url, root)
        self._schema = read_options(url).get("schema", "main")

    def list_tables(self) -> list[str]:
        sql = (
            "SELECT table_name FROM duckdb_tables() WHERE database_name = 'source' AND schema_name = ? AND NOT internal"
        )
        with self._open() as connection:
            return sorted(row[0] for row in connection.execute(sql, [self._schema]).fetchall())

    def describe_table(self, name: str) -> SourceTable:
        columns = (
            "SELECT column_name, data_type, is_nullable FROM duckdb_columns() WHERE database_name = 'source' "
            "AND schema_name = ? AND table_name = ? ORDER BY column_index"
        )
        keys = (
            "SELECT constraint_column_names FROM duckdb_constraints() WHERE database_name = 'source' "
            "AND schema_name = ? AND table_name = ? AND constraint_type = 'PRIMARY KEY'"
        )
        with self._open() as connection:
            found = connection.execute(columns, [self._schema, name]).fetchall()
            key = connection.execute(keys, [self._schema, name]).fetchone()
        if not found:
            tables = ", ".join(self.list_tables()[:40])
            raise TableMissing(name, hint=f"Looked in {self.url}. It has: {tables}.")
        return SourceTable(
            name=name, columns=tuple(describe_column(*row) for row in found), key=tuple(key[0]) if key else ()
        )

    def can_carry(self, column: Column, type_name: str) -> bool:
        return type_name == "VARCHAR" and column.type != "BLOB"

    @contextmanager
    def open_snapshot(self, folder: Path) -> Iterator[SnapshotToken | None]:
        """Hold the file open: DuckDB lets nobody write to a file that another process reads.

        A file that was not written to since is at the same moment, also for a batch that is resumed.
        """
        with self._open():
            yield {"id": f"file-{self._fingerprint()}"}

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        if not self._path.is_file():
            raise SourceUnavailable(
                f"The DuckDB database {self._path} does not exist.", hint="Check [source] url in phasewise.toml."
            )
        try:
            connection.execute(f"ATTACH {quote_literal(str(self._path))} AS source (READ_ONLY)")
        except duckdb.Error as exc:
            raise SourceUnavailable(
                f"The DuckDB database {self._path} cannot be opened: {str(exc).splitlines()[0]}",
                hint="Close the program that writes to it, or check that it is a database of this version.",
            ) from exc

    def select(self, table: SourceTable) -> str:
        columns = ", ".join(
            f"CAST({quote_identifier(column.name)} AS {column.type}) AS {quote_identifier(column.name)}"
            for column in table.columns
        )
        return f"SELECT {columns} FROM {self._read(table)}{table.where()}"

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        return compare_typed(quote_identifier(column.name), column.type, operator, mark)

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide by rowid, of which a scan skips the row groups that are not asked for; a view has none."""
        sizes = connection.execute(
            "SELECT estimated_size FROM duckdb_tables() WHERE database_name = 'source' AND schema_name = ? "
            "AND table_name = ?",
            [self._schema, table.name],
        ).fetchall()
        if not sizes or sizes[0][0] <= limit:
            return []
        # Deleted rows leave gaps: the rows of each stretch are counted.
        blocks = connection.execute(
            f"SELECT rowid // {BLOCK_ROWS} * {BLOCK_ROWS}, count(*) FROM {self._read(table)}{table.where()} "
            "GROUP BY 1 ORDER BY 1"
        ).fetchall()
        return divide(["rowid"], [[str(start)] for start in find_bounds(blocks, limit)])

    def _fingerprint(self) -> str:
        # What was committed and not yet moved into the file lies next to it.
        wal = self._path.with_name(f"{self._path.name}.wal")
        stats = [path.stat() for path in (self._path, wal) if path.exists()]
        return "-".join(f"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}" for stat in stats)

    def _read(self, table: SourceTable) -> str:
        return f"source.{quote_identifier(self._schema)}.{quote_identifier(table.name)}"


def describe_column(name: str, declared: str, is_nullable: bool) -> Column:
    lake_type, note = _find_lake_type(declared)
    return Column(name=name, source_type=declared, type=lake_type, nullable=is_nullable, note=note)
