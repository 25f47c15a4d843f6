"""SQLite as a source: ``sqlite:///relative.db``, ``sqlite:////absolute.db``.

SQLite gives a type to each value, a column only prefers one. So a table whose columns are all of the families
INTEGER, REAL and TEXT is scanned directly: the scanner then refuses a value of another type by itself. Any other
table (dates, decimals, blobs, untyped and generated columns, views, a contract that asks for another type or has
a condition) is read as text with the type of each value before it, and every value is decoded and checked in DuckDB.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

import duckdb

from phasewise.errors import (
    PhasewiseError,
    ProjectError,
    SourceError,
    SourceUnavailable,
    StagingError,
    TableMissing,
    UnfaithfulValue,
)
from phasewise.lake import quote_identifier, quote_literal
from phasewise.project import redact_url
from phasewise.settings import Settings
from phasewise.sources import Column, SnapshotToken, SourceTable
from phasewise.sources.decoding import MOMENTS, decode_text, explain_unfaithful, fail_where_null
from phasewise.sources.ranges import divide, query_bounds

# Declared types that DuckDB's scanner maps as SQLite's own rules do, and whose values it checks one by one.
_SCANNED = re.compile(
    r"(?:(?:TINY|SMALL|MEDIUM|BIG)?INT(?:EGER)?|INT[248])(?:\(\d+\))?"
    r"|(?:N?(?:VAR)?CHAR|VARYING CHARACTER)(?:\(\d+\))?|TEXT|CLOB"
    r"|REAL|FLOAT|DOUBLE(?: PRECISION)?"
)
_DECIMAL = re.compile(r"(?:DECIMAL|DEC|NUMERIC|NUMBER)\s*\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")

_SMALL_DECIMAL = re.compile(r"DECIMAL\((\d+),\d+\)")

#: DuckDB types that any value of a SQLite column can be checked against.
_DECODABLE = re.compile(
    r"VARCHAR|BLOB|BIGINT|DOUBLE|BOOLEAN|DATE|TIME|TIMESTAMP|TIMESTAMP WITH TIME ZONE|UUID|DECIMAL\(\d+,\d+\)"
)
_NUMBERS = {"BIGINT", "DOUBLE", "BOOLEAN"}


class SqliteSource:
    """A SQLite database file.

    Questions about the schema go through Python's ``sqlite3``, rows through DuckDB's scanner: two libraries. When
    one of them closes the file, POSIX takes away the locks that the other holds in the same process. So what
    asks here never runs between ``begin`` and the end of the transaction.
    """

    extensions: tuple[str, ...] = ("sqlite_scanner",)

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        self._url = url
        self._path = _find_path(url, root)
        self._timeout = settings.connect_timeout

    @property
    def url(self) -> str:
        return redact_url(self._url)

    def check(self) -> None:
        with self._open() as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def list_tables(self) -> list[str]:
        # Virtual tables need modules that the scanner's SQLite lacks; shadow tables are their insides.
        sql = (
            "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' "
            "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
        with self._open() as connection:
            return sorted(row[0] for row in connection.execute(sql))

    def describe_table(self, name: str) -> SourceTable:
        with self._open() as connection:
            kind = connection.execute(
                "SELECT name FROM pragma_table_list WHERE schema = 'main' AND name = ?", (name,)
            ).fetchone()
            # hidden: 0 a column, 2 and 3 generated; 1 is an inside of a virtual table.
            columns = connection.execute(
                'SELECT name, type, "notnull", pk, hidden FROM pragma_table_xinfo(?) WHERE hidden <> 1', (name,)
            ).fetchall()
            rows = _estimate_rows(connection, name) if kind else None
        if kind is None or kind[0] != name:
            raise TableMissing(name, hint=f"Looked in {self.url}. {self._list_for_hint()}")
        key = sorted((pk, column) for column, _, _, pk, _ in columns if pk)
        return SourceTable(
            name=name,
            columns=tuple(_describe_column(*column) for column in columns),
            key=tuple(column for _, column in key),
            row_estimate=rows,
        )

    def can_carry(self, column: Column, type_name: str) -> bool:
        if not _DECODABLE.fullmatch(type_name):
            return False
        natural, _ = _find_type(column.source_type)
        if type_name == "VARCHAR" or _find_note(column.source_type):
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
            self._path = Path(snapshot["path"])
        self.check()  # the scanner's own message for a missing or damaged file says less
        path = quote_literal(str(self._path))
        # Two scan threads saw two states of the database within one transaction.
        connection.execute("SET sqlite_disable_multithreaded_scans = true")
        milliseconds = int(self._timeout * 1000)
        connection.execute(f"ATTACH {path} AS source (TYPE sqlite, READ_ONLY, BUSY_TIMEOUT {milliseconds})")

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        connection.execute("BEGIN TRANSACTION")

    def select(self, table: SourceTable) -> str:
        if not table.conditions and all(_is_scanned(column) for column in table.columns):
            names = ", ".join(_scan_column(column) for column in table.columns)
            return f"SELECT {names} FROM source.{quote_identifier(table.name)}"
        decoded = ", ".join(
            f"{_decode_or_fail(column, f'c{index}')} AS {quote_identifier(column.name)}"
            for index, column in enumerate(table.columns)
        )
        checked = ", ".join(f"{_check_utf8(f'c{index}')} AS c{index}" for index in range(len(table.columns)))
        return f"SELECT {decoded} FROM (SELECT {checked} FROM {_read_tagged(table, is_short=True)})"

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
            return f"({padded} {operator} {quote_literal(_pad_moment(mark))} OR typeof({name}) <> 'text')"
        if column.type == "DATE":
            return f"({name} COLLATE BINARY {operator} {quote_literal(mark)} OR typeof({name}) <> 'text')"
        if column.type == "VARCHAR":
            return f"{name} COLLATE BINARY {operator} {quote_literal(mark)}"
        return f"{name} {operator} {mark}"

    def count_rows(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, rows_read: int) -> int:
        inner = quote_literal(f"SELECT count(*) FROM {quote_identifier(table.name)}{table.where()}")
        row = connection.execute(f"SELECT columns(*)::BIGINT FROM sqlite_query('source', {inner})").fetchone()
        assert row is not None  # an aggregate has a row
        return int(row[0])

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide by rowid, which a SELECT finds without reading the rows before; WITHOUT ROWID by the primary key."""
        columns = self._find_range_columns(connection, table)
        rows = self.count_rows(connection, table, 0)
        if not columns or rows <= limit:
            return []
        relation = f"{quote_identifier(table.name)}{table.where()}"
        inner = query_bounds(columns, [f"quote({name})" for name in columns], relation, rows=rows, limit=limit)
        bounds = connection.execute(f"FROM sqlite_query('source', {quote_literal(inner)})").fetchall()
        return divide(columns, bounds)

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        if "database is locked" in str(error):
            return self._unavailable("is locked by another program", "Close it or try again later.")
        try:
            found = self._find_unfaithful(connection, table)
        except duckdb.Error:
            found = None  # such as for a condition that SQLite does not understand
        return found or SourceError(f'Table "{table.name}" of {self.url} cannot be read: {error}')

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        rowid = ["rowid"] if not table.key and self._has_rowid(table.name) else []
        tagged = _read_tagged(table, text_as_hex=True, extra=rowid)
        bad = [_is_unfaithful(column, f"c{index}") for index, column in enumerate(table.columns)]
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
        where = [f"{name} = {_show(value)}" for name, value in zip(table.key or rowid, sample[1:], strict=True)]
        return _explain_unfaithful(table, table.columns[index], counts[index], sample[0], where)

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
        with self._open() as connection:
            row = connection.execute(
                "SELECT type = 'table' AND NOT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (name,)
            ).fetchone()
        return bool(row and row[0])

    def _list_for_hint(self) -> str:
        tables = self.list_tables()
        return f"It has: {', '.join(tables[:40])}." if tables else "It has no tables."

    def _copy_to(self, target: Path) -> None:
        fresh = target.with_suffix(f".{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(self._path, target.parent)
            with self._open() as connection, closing(sqlite3.connect(fresh)) as copy:
                connection.backup(copy)
                # Readers of a database in WAL mode write beside it; the copy needs no writer.
                copy.execute("PRAGMA journal_mode = DELETE")
            fresh.replace(target)
        except OSError as exc:
            raise StagingError(
                f"The copy of {self.url} cannot be written to {target}: {exc.strerror}.",
                hint="Free disk space, or make the folder writable.",
            ) from exc
        finally:
            fresh.unlink(missing_ok=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
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
            with closing(sqlite3.connect(uri, uri=True, timeout=self._timeout)) as connection:
                connection.text_factory = lambda value: value.decode("utf-8", "surrogateescape")
                yield connection
        except sqlite3.DatabaseError as exc:
            raise self._translate(exc) from exc

    def _translate(self, exc: sqlite3.DatabaseError) -> SourceUnavailable:
        text = str(exc)
        if "locked" in text or "busy" in text:
            return self._unavailable("is locked by another program", "Close it or try again later.")
        if "not a database" in text or "malformed" in text:
            return self._unavailable(f"is not a SQLite database ({text})", "Check [source] url in phasewise.toml.")
        return self._unavailable(f"cannot be read: {text}", "Check the permissions of the file and its folder.")

    def _unavailable(self, what: str, hint: str) -> SourceUnavailable:
        return SourceUnavailable(f"The SQLite database {self._path} {what}.", hint=hint)


def list_types() -> list[Column]:
    """Return one column for each kind of declared type, for the reference (docs/reference/types.md)."""
    declared = "INTEGER|BIGINT|REAL|DOUBLE PRECISION|TEXT|VARCHAR(40)|BLOB|BOOLEAN|DATE|DATETIME|TIMESTAMP|TIME"
    declared += "|DECIMAL(10,2)|NUMERIC|DECIMAL(40,2)|JSON||ANY"
    return [_describe_column(name or "(none)", name, 0, 0, 0) for name in declared.split("|")]


def _pad_moment(mark: str) -> str:
    return f"{mark}{'' if len(mark) > 19 else '.'}000000"[:26]


def _find_path(url: str, root: Path) -> Path:
    # SQLAlchemy's rule: three slashes are relative (here to the project), four are absolute.
    parts = urlsplit(url.replace("#", "%23"))
    if parts.netloc or not parts.path.startswith("/") or len(parts.path) < 2:
        raise ProjectError(
            f'"{redact_url(url)}" names no SQLite file.',
            hint="Write sqlite:///relative/to/project.db or sqlite:////absolute.db.",
        )
    return (root / parts.path[1:].replace("%23", "#")).absolute()


def _estimate_rows(connection: sqlite3.Connection, name: str) -> int | None:
    """Return the largest rowid, which one look at the end of the table finds; None for tables without one."""
    try:
        row = connection.execute(f"SELECT max(rowid) FROM {quote_identifier(name)}").fetchone()
    except sqlite3.Error:  # a view, or a table WITHOUT ROWID
        return None
    return row[0] if isinstance(row[0], int) and row[0] >= 0 else None


def _describe_column(name: str, declared: str, not_null: int, pk: int, hidden: int) -> Column:
    type_name, note = _find_type(declared)
    if hidden and not note:
        note = "generated by the source"
    return Column(name=name, source_type=declared, type=type_name, nullable=not (not_null or pk), note=note)


def _find_type(declared: str) -> tuple[str, str | None]:
    """Return the lake's type for a declared type, and a note; SQLite's affinity rules, in their order.

    https://sqlite.org/datatype3.html, section 3.1; its last family, NUMERIC, is told apart further.
    """
    upper = " ".join(declared.upper().split())
    if "INT" in upper:
        return "BIGINT", None
    if any(word in upper for word in ("CHAR", "CLOB", "TEXT")):
        return "VARCHAR", None
    if "BLOB" in upper:
        return "BLOB", None
    if any(word in upper for word in ("REAL", "FLOA", "DOUB")):
        return "DOUBLE", None
    return _find_numeric_type(upper), _find_note(declared)


def _find_numeric_type(upper: str) -> str:
    exact = {"DATE": "DATE", "TIME": "TIME", "DATETIME": "TIMESTAMP", "TIMESTAMP": "TIMESTAMP"}
    if upper in exact:
        return exact[upper]
    if upper in {"BOOLEAN", "BOOL"}:
        return "BOOLEAN"
    if match := _DECIMAL.fullmatch(upper):
        precision, scale = int(match[1]), int(match[2] or 0)
        if 1 <= precision <= 38 and scale <= precision:
            return f"DECIMAL({precision},{scale})"
    return "DOUBLE" if upper in {"NUMERIC", "DECIMAL", "DEC", "NUMBER"} else "VARCHAR"


def _find_note(declared: str) -> str | None:
    upper = " ".join(declared.upper().split())
    families = ("INT", "CHAR", "CLOB", "TEXT", "BLOB", "REAL", "FLOA", "DOUB")
    if any(word in upper for word in families) or _find_numeric_type(upper) != "VARCHAR":
        return None
    if not upper:
        return "carried as text: the column has no declared type"
    return f"carried as text: neither SQLite nor the lake has a type {declared}"


def _is_scanned(column: Column) -> bool:
    upper = " ".join(column.source_type.upper().split())
    return column.note is None and bool(_SCANNED.fullmatch(upper))


def _scan_column(column: Column) -> str:
    name = quote_identifier(column.name)
    return f"{_check_utf8(name)} AS {name}" if column.type == "VARCHAR" else name


def _check_utf8(expression: str) -> str:
    # The scanner hands on texts unchecked, and a Parquet file with bytes that are not UTF-8 is one nobody can
    # read. Decoding what was encoded fails on them; it costs 8 % of a scan of texts.
    return f"decode(encode({expression}))"


def _read_tagged(
    table: SourceTable, *, text_as_hex: bool = False, is_short: bool = False, extra: list[str] | None = None
) -> str:
    """Return a relation with the columns c0, c1, …: each value as text after one letter that tells its type.

    ``i`` an integer, ``r`` a real, ``t`` a text, ``x`` a text in hexadecimal, ``b`` a blob in hexadecimal.
    Hexadecimal texts may hold bytes that are not UTF-8. With *is_short* values of the types that a column is there for
    (``_find_short``) have no letter.
    """
    names = [column.name for column in table.columns] + (extra or [])
    as_hex = {column.name for column in table.columns if text_as_hex or _is_text_as_blob(column)}
    short = {column.name: _find_short(column) for column in table.columns if is_short}
    tagged = ", ".join(
        f"{_tag(quote_identifier(name), text_as_hex=name in as_hex, short=short.get(name, ()))} AS c{index}"
        for index, name in enumerate(names)
    )
    inner = f"SELECT {tagged} FROM {quote_identifier(table.name)}{table.where()}"
    return f"sqlite_query('source', {quote_literal(inner)})"


def _tag(name: str, *, text_as_hex: bool, short: tuple[str, ...] = ()) -> str:
    # 20 digits: SQLite's 17 are not the nearest ones for large exponents (542 of 400,000 random doubles came
    # back changed, none with 20).
    printed = {"integer": name, "real": f"printf('%!.20g', {name})", "text": name, "blob": f"hex({name})"}
    letters = {"integer": "i", "real": "r", "text": "t", "blob": "b"}
    if text_as_hex:
        printed["text"], letters["text"] = f"hex({name})", "x"
    prefixes = {kind: "" if kind in short else f"'{letter}' || " for kind, letter in letters.items()}
    cases = " ".join(f"WHEN '{kind}' THEN {prefixes[kind]}{text}" for kind, text in printed.items())
    return f"CASE typeof({name}) {cases} END"


def _find_short(column: Column) -> tuple[str, ...]:
    """Return the types of SQLite whose values need no letter in *column*: with one they decode to NULL there."""
    if column.type == "BIGINT":
        return ("integer",)
    if column.type == "DOUBLE":
        return ("real",)
    if (match := _SMALL_DECIMAL.fullmatch(column.type)) and int(match[1]) <= 15:
        return ("integer", "real")
    return ("text",) if column.type in MOMENTS or column.type == "UUID" else ()


def _decode_or_fail(column: Column, value: str) -> str:
    return fail_where_null(_decode_short(column, value), value, column.type)


def _decode_short(column: Column, value: str) -> str:
    """Return what ``_decode`` does, for a value that may have no letter (``is_short``): in half of its time."""
    short = _find_short(column)
    if not short:
        return _decode(column, value)
    if short == ("text",):
        return decode_text(column.type, value)
    if short == ("integer",):
        return f"TRY_CAST({value} AS BIGINT)"
    if short == ("real",):
        return f"CASE WHEN left({value}, 1) = 'i' THEN {_decode(column, value)} ELSE TRY_CAST({value} AS DOUBLE) END"
    # Fifteen digits are less than 2**53: a double holds each such integer, and any larger one overflows the decimal.
    double = f"TRY_CAST({value} AS DOUBLE)"
    decimal = f"TRY_CAST({double} AS {column.type})"
    return f"CASE WHEN CAST({decimal} AS DOUBLE) = {double} THEN {decimal} END"


def _is_unfaithful(column: Column, tagged: str) -> str:
    return f"({tagged} IS NOT NULL AND ({_decode(column, tagged)}) IS NULL)"


def _is_text_as_blob(column: Column) -> bool:
    """Tell whether the contract takes the bytes of texts: the way for texts that are not UTF-8."""
    return column.type == "BLOB" and _find_type(column.source_type)[0] != "BLOB"


def _decode(column: Column, tagged: str) -> str:
    """Return an expression for the value of *tagged* in its column's type, NULL where it would be another value."""
    type_name, is_text_as_blob = column.type, _is_text_as_blob(column)
    value = f"substr({tagged}, 2)"
    kind = f"left({tagged}, 1)"
    text = f"CASE {kind} WHEN 't' THEN {value} WHEN 'x' THEN TRY(decode(unhex({value}))) END"
    double = f"TRY_CAST({value} AS DOUBLE)"
    if type_name == "VARCHAR":
        return f"CASE {kind} WHEN 'i' THEN {value} WHEN 'r' THEN CAST({double} AS VARCHAR) ELSE {text} END"
    if type_name == "BLOB":
        kinds = "('b', 'x')" if is_text_as_blob else "('b')"
        return f"CASE WHEN {kind} IN {kinds} THEN unhex({value}) END"
    if type_name == "BIGINT":
        return f"CASE WHEN {kind} = 'i' THEN CAST({value} AS BIGINT) END"
    if type_name == "BOOLEAN":
        return f"CASE {tagged} WHEN 'i0' THEN false WHEN 'i1' THEN true END"
    if type_name == "DOUBLE":
        # A double holds every integer up to 2**53 and then ever fewer.
        exact = f"TRY_CAST({double} AS HUGEINT) = CAST({value} AS HUGEINT)"
        return f"CASE {kind} WHEN 'r' THEN {double} WHEN 'i' THEN CASE WHEN {exact} THEN {double} END END"
    if type_name.startswith("DECIMAL"):
        decimal = f"TRY_CAST({double} AS {type_name})"
        same = f"CASE WHEN CAST({decimal} AS DOUBLE) = {double} THEN {decimal} END"
        return f"CASE {kind} WHEN 'i' THEN TRY_CAST({value} AS {type_name}) WHEN 'r' THEN {same} END"
    return decode_text(type_name, f"({text})")


def _explain_unfaithful(
    table: SourceTable, column: Column, count: int, tagged: str, where: list[str]
) -> UnfaithfulValue:
    kind = {"i": "integer", "r": "real", "x": "text", "t": "text", "b": "blob"}[tagged[0]]
    return explain_unfaithful(
        table.name,
        column,
        count=count,
        value=f"the {kind} {_show(tagged)}",
        where=", ".join(where),
        other="BLOB" if column.type == "VARCHAR" else "VARCHAR",
    )


def _show(tagged: str | None) -> str:
    if tagged is None:
        return "NULL"
    kind, value = tagged[0], tagged[1:]
    if kind == "x":
        value = bytes.fromhex(value).decode("utf-8", "backslashreplace")
    short = value if len(value) <= 60 else f"{value[:60]}…"
    return {"i": short, "r": repr(float(value)) if kind == "r" else "", "b": f"x'{short}'"}.get(kind, f"'{short}'")


def _check_space(database: Path, folder: Path) -> None:
    size_bytes, free_bytes = database.stat().st_size, shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise StagingError(
            f"A copy of {database} needs {size_bytes} bytes, and {folder} has {free_bytes} free.",
            hint="Free disk space, or move the project's state folder.",
        )
