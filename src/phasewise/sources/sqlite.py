"""SQLite as a source: ``sqlite:///relative.db``, ``sqlite:////absolute.db``.

SQLite gives a type to each value, a column only prefers one. A table is scanned directly where the scanner keeps or
refuses every value of all of its columns: those of the families INTEGER, REAL and TEXT; decimals, booleans, blobs,
dates and timestamps, when SQLite finds no value in them that the scanner would change. Any other table (untyped and
generated columns, a contract that asks for another type or has a condition) is read as text with the type of each
value before it, and every value is decoded and checked in DuckDB (``sqlite_values``).
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import duckdb

from phasewise.errors import (
    PhasewiseError,
    ProjectError,
    SourceUnavailable,
    StagingError,
    TableMissing,
    UnfaithfulValue,
)
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import use_one_thread
from phasewise.project.urls import find_local_path
from phasewise.settings import Settings
from phasewise.sources.databases import DuckdbReader
from phasewise.sources.decoding import MOMENTS
from phasewise.sources.protocol import Column, SnapshotToken, SourceTable, StagedRows
from phasewise.sources.ranges import divide, query_bounds
from phasewise.sources.sqlite_values import (
    check_utf8,
    decode_or_fail,
    explain_tagged,
    find_changed,
    find_note,
    find_type,
    is_unfaithful,
    read_tagged,
    scan_column,
)
from phasewise.system.files import replace_whole

#: DuckDB types that any value of a SQLite column can be checked against.
_DECODABLE = re.compile(
    r"VARCHAR|BLOB|BIGINT|DOUBLE|BOOLEAN|DATE|TIME|TIMESTAMP|TIMESTAMP WITH TIME ZONE|UUID|DECIMAL\(\d+,\d+\)"
)
_NUMBERS = {"BIGINT", "DOUBLE", "BOOLEAN"}
#: Rowids of a range that one thread scans.
_SCAN_ROWS = 122_880


class SqliteSource(DuckdbReader):
    """A SQLite database file.

    Questions about the schema go through Python's ``sqlite3``, rows through DuckDB's scanner: two libraries. When
    one of them closes the file, POSIX takes away the locks that the other holds in the same process. So what
    asks here never runs between ``begin`` and the end of the transaction.
    """

    extensions = ("sqlite_scanner",)

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        super().__init__(url, settings)
        self._path = find_local_path(url, root)
        #: Whether the file is the batch's own copy, which nobody writes to.
        self._is_copy = False

    def check(self) -> None:
        with self._open_file() as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def list_tables(self) -> list[str]:
        # Virtual tables need modules that the scanner's SQLite lacks; shadow tables are their insides.
        sql = (
            "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' "
            "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
        with self._open_file() as connection:
            return sorted(row[0] for row in connection.execute(sql))

    def describe_table(self, name: str) -> SourceTable:
        with self._open_file() as connection:
            kind = connection.execute(
                "SELECT name FROM pragma_table_list WHERE schema = 'main' AND name = ?", (name,)
            ).fetchone()
            # hidden: 0 a column, 2 and 3 generated; 1 is an inside of a virtual table.
            columns = connection.execute(
                'SELECT name, type, "notnull", pk, hidden FROM pragma_table_xinfo(?) WHERE hidden <> 1', (name,)
            ).fetchall()
            rows = _estimate_rows(connection, name) if kind else None
        if kind is None or kind[0] != name:
            tables = ", ".join(self.list_tables()[:40])
            raise TableMissing(name, hint=f"Looked in {self.url}. It has{f': {tables}' if tables else ' no tables'}.")
        key = sorted((pk, column) for column, _, _, pk, _ in columns if pk)
        return SourceTable(
            name=name,
            columns=tuple(describe_column(*column) for column in columns),
            key=tuple(column for _, column in key),
            row_estimate=rows,
        )

    def can_carry(self, column: Column, type_name: str) -> bool:
        if not _DECODABLE.fullmatch(type_name):
            return False
        natural, _ = find_type(column.source_type)
        if type_name == "VARCHAR" or find_note(column.source_type):
            return True
        is_number = type_name in _NUMBERS or type_name.startswith("DECIMAL")
        if natural in _NUMBERS or natural.startswith("DECIMAL"):
            return is_number
        if natural == "VARCHAR":
            return type_name in MOMENTS or type_name in {"UUID", "BLOB"}
        # A column declared as a date may hold days, seconds or text: whatever it is, it is checked.
        return natural in MOMENTS and (is_number or type_name in MOMENTS)

    @contextmanager
    def open_snapshot(self, folder: Path) -> Iterator[SnapshotToken]:
        """Copy the database as it is now into *folder*; the copy goes when the block ends well.

        A reader cannot enter the moment of another process's transaction in SQLite, and holding writers off for
        as long as all tables take would block the source. A copy is one moment for all processes, and for a
        resumed batch too: it stays when the block fails, and is found again.
        """
        target = folder / "source.sqlite"
        if not target.exists():
            self._copy_to(target)
        copied = target.stat().st_mtime_ns
        taken_at = datetime.fromtimestamp(copied / 1e9, UTC).isoformat()
        yield {"id": f"copy-{copied}", "path": str(target), "taken_at": taken_at}
        target.unlink(missing_ok=True)

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        if snapshot is not None:
            self._path, self._is_copy = Path(snapshot["path"]), True
        self.check()  # the scanner's own message for a missing or damaged file says less
        path = quote_literal(str(self._path))
        # Two scan threads saw two states of the database within one transaction.
        connection.execute("SET sqlite_disable_multithreaded_scans = true")
        use_one_thread(connection)
        milliseconds = int(self._settings.connect_timeout * 1000)
        connection.execute(f"ATTACH {path} AS source (TYPE sqlite, READ_ONLY, BUSY_TIMEOUT {milliseconds})")
        self._attached = connection

    def select(self, table: SourceTable) -> str:
        scanned = [(scan_column(column), quote_identifier(column.name)) for column in table.columns]
        if not table.conditions and all(value for value, _ in scanned) and self._is_kept(table):
            values = ", ".join(f"{value} AS {name}" for value, name in scanned)
            return f"SELECT {values} FROM {self._scan(table)}"
        decoded = ", ".join(
            f"{decode_or_fail(column, f'c{index}')} AS {quote_identifier(column.name)}"
            for index, column in enumerate(table.columns)
        )
        checked = ", ".join(f"{check_utf8(f'c{index}')} AS c{index}" for index in range(len(table.columns)))
        return f"SELECT {decoded} FROM (SELECT {checked} FROM {read_tagged(table, is_short=True)})"

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        name = quote_identifier(column.name)
        if operator == "IS NULL":
            return f"{name} IS NULL"
        if column.type == "TIMESTAMP WITH TIME ZONE":
            raise ProjectError(
                f'The column "{column.name}" cannot be a cursor: SQLite does not compare texts with time zones.',
                hint="Take another column.",
            )
        if column.type == "TIMESTAMP":  # 26 characters: "T" or space, with or without a fraction
            padded = f"substr(replace({name}, 'T', ' ') || iif(length({name}) > 19, '', '.') || '000000', 1, 26)"
            moment = f"{mark}{'' if len(mark) > 19 else '.'}000000"[:26]
            return f"({padded} {operator} {quote_literal(moment)} OR typeof({name}) <> 'text')"
        if column.type == "DATE":
            return f"({name} COLLATE BINARY {operator} {quote_literal(mark)} OR typeof({name}) <> 'text')"
        if column.type == "VARCHAR":
            return f"{name} COLLATE BINARY {operator} {quote_literal(mark)}"
        return f"{name} {operator} {mark}"

    def count_rows(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, staged: StagedRows | None = None
    ) -> int:
        use_one_thread(connection)
        return _ask_number(connection, f"SELECT count(*) FROM {quote_identifier(table.name)}{table.where()}")

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide by rowid, which a SELECT finds without reading the rows before; WITHOUT ROWID by the primary key."""
        columns = self._find_range_columns(connection, table)
        rows = self.count_rows(connection, table)
        if not columns or rows <= limit:
            return []
        relation = f"{quote_identifier(table.name)}{table.where()}"
        inner = query_bounds(columns, [f"quote({name})" for name in columns], relation, rows=rows, limit=limit)
        bounds = connection.execute(f"FROM sqlite_query('source', {quote_literal(inner)})").fetchall()
        return divide(columns, bounds)

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        if "database is locked" in str(error):
            return self._unavailable("is locked by another program", "Close it, or retry later.")
        return super().explain(connection, table, error)

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        rowid = ["rowid"] if not table.key and self._has_rowid(table.name) else []
        tagged = read_tagged(table, text_as_hex=True, extra=rowid)
        bad = [is_unfaithful(column, f"c{index}") for index, column in enumerate(table.columns)]
        counts = connection.execute(
            f"SELECT {', '.join(f'count(*) FILTER (WHERE {test})' for test in bad)} FROM {tagged}"
        ).fetchone()
        index = next((index for index, count in enumerate(counts or ()) if count), None)
        if counts is None or index is None:
            return None
        names = [column.name for column in table.columns]
        keys = [f"c{names.index(name)}" for name in table.key] or [f"c{len(names) + i}" for i in range(len(rowid))]
        sample = connection.execute(
            f"SELECT {', '.join([f'c{index}', *keys])} FROM {tagged} WHERE {bad[index]} LIMIT 1"
        ).fetchone()
        assert sample is not None  # it was counted above
        return explain_tagged(table, table.columns[index], table.key or rowid, sample, count=counts[index])

    def _scan(self, table: SourceTable) -> str:
        """Return the scanner's relation for *table*, in the way that costs less where both see the same rows."""
        # The connection of ATTACH takes and gives back a mutex several times a value, a third of the scan. sqlite_scan
        # opens one without, which is not in the transaction: of a file that nobody writes to it sees the same. It
        # reads ranges of what is called rowid, which may be a column, and each thread has a connection and ranges of
        # its own.
        if self._is_copy and self._attached and self._find_range_columns(self._attached, table)[:1] == ["rowid"]:
            if (table.row_estimate or 0) > _SCAN_ROWS:
                self._attached.execute(f"SET threads = {self._settings.threads}")
            return f"sqlite_scan({quote_literal(str(self._path))}, {quote_literal(table.name)})"
        return f"source.{quote_identifier(table.name)}"

    def _is_kept(self, table: SourceTable) -> bool:
        """Ask SQLite, in the transaction of the scan, whether the scanner keeps every value of *table*."""
        changed = [condition for column in table.columns if (condition := find_changed(column))]
        if not changed or self._attached is None:
            return not changed
        # In groups: an expression may be 1,000 operators deep.
        groups = [" OR ".join(changed[start : start + 100]) for start in range(0, len(changed), 100)]
        condition = " OR ".join(f"({group})" for group in groups)
        inner = f"SELECT EXISTS (SELECT 1 FROM {quote_identifier(table.name)} WHERE {condition})"
        return not _ask_number(self._attached, inner)

    def _find_range_columns(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> list[str]:
        """Return the name by which SQLite knows the rowid, else the key; none for a view, and where all are taken."""
        name = quote_literal(table.name)
        inner = (
            f"SELECT c.name, t.wr, c.pk FROM pragma_table_list({name}) AS t, pragma_table_xinfo({name}) AS c "
            "WHERE t.schema = 'main' AND t.type = 'table'"
        )
        found = connection.execute(f"FROM sqlite_query('source', {quote_literal(inner)})").fetchall()
        taken = {str(column).casefold() for column, _, _ in found}
        if found and not int(found[0][1]):  # what a pragma tells has no type and arrives as text
            return [name for name in ("rowid", "_rowid_", "oid") if name not in taken][:1]
        key = sorted((int(pk), quote_identifier(column)) for column, _, pk in found if int(pk))
        return [column for _, column in key]

    def _has_rowid(self, name: str) -> bool:
        with self._open_file() as connection:
            row = connection.execute(
                "SELECT type = 'table' AND NOT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (name,)
            ).fetchone()
        return bool(row and row[0])

    def _copy_to(self, target: Path) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(self._path, target.parent)
            with (
                replace_whole(target) as draft,
                self._open_file() as connection,
                closing(sqlite3.connect(draft)) as copy,
            ):
                connection.backup(copy)
                # Readers of a database in WAL mode write next to it; the copy needs no writer.
                copy.execute("PRAGMA journal_mode = DELETE")
        except OSError as exc:
            raise StagingError(
                f"The copy of {self.url} cannot be written to {target}: {exc.strerror}.",
                hint="Free disk space, or make the folder writable.",
            ) from exc

    @contextmanager
    def _open_file(self) -> Iterator[sqlite3.Connection]:
        """Open read-only, for questions about the schema; a missing file is never created."""
        if not self._path.exists():
            raise self._unavailable(
                "does not exist",
                "Check [source] url in phasewise.toml, or create it (the example's: phasewise demo-data).",
            )
        if not self._path.is_file():
            raise self._unavailable("is not a file", "Check [source] url in phasewise.toml.")
        try:
            uri = f"file:{quote(str(self._path))}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, timeout=self._settings.connect_timeout)) as connection:
                connection.text_factory = lambda value: value.decode("utf-8", "surrogateescape")
                yield connection
        except sqlite3.DatabaseError as exc:
            raise self._translate(exc) from exc

    def _translate(self, exc: sqlite3.DatabaseError) -> SourceUnavailable:
        text = str(exc)
        if "locked" in text or "busy" in text:
            return self._unavailable("is locked by another program", "Close it, or retry later.")
        if "not a database" in text or "malformed" in text:
            return self._unavailable(f"is not a SQLite database ({text})", "Check [source] url in phasewise.toml.")
        return self._unavailable(f"cannot be read: {text}", "Check the permissions of the file and its folder.")

    def _unavailable(self, what: str, hint: str) -> SourceUnavailable:
        return SourceUnavailable(f"The SQLite database {self._path} {what}.", hint=hint)


def _ask_number(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    """Return the number that SQLite answers to *sql* in the transaction of the scan."""
    return fetch_int(connection, f"SELECT columns(*)::BIGINT FROM sqlite_query('source', {quote_literal(sql)})")


def _estimate_rows(connection: sqlite3.Connection, name: str) -> int | None:
    """Return the largest rowid, which one look at the end of the table finds; None for tables without one."""
    try:
        row = connection.execute(f"SELECT max(rowid) FROM {quote_identifier(name)}").fetchone()
    except sqlite3.Error:  # a view, or a table WITHOUT ROWID
        return None
    return row[0] if isinstance(row[0], int) and row[0] >= 0 else None


def describe_column(name: str, declared: str, not_null: int, pk: int, hidden: int) -> Column:
    type_name, note = find_type(declared)
    if hidden and not note:
        note = "generated by the source"
    return Column(name=name, source_type=declared, type=type_name, nullable=not (not_null or pk), note=note)


def _check_space(database: Path, folder: Path) -> None:
    size_bytes, free_bytes = database.stat().st_size, shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise StagingError(
            f"A copy of {database} needs {size_bytes} bytes, and {folder} has {free_bytes} free.",
            hint="Free disk space, or move the project's state folder.",
        )
