"""Files as a source: ``file:///relative/folder``, ``file:////absolute/folder``, ``file:///exports/2024-*.csv``.

A folder is a database: each CSV, JSON or Parquet file in it (also compressed with gzip or zstd) is the table of its
name, and each folder in it is one table of all its files. A pattern selects files of one folder.

CSV and JSON have no types, and guessing them changes values (``007`` becomes 7), so their columns are carried as
text. The contract gives them types: every value is then checked, and one that would change fails.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from phasewise.errors import PhasewiseError, ProjectError, SourceError, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.lake import open_session, quote_identifier, quote_literal
from phasewise.project import redact_url
from phasewise.settings import Settings
from phasewise.sources import Column, SnapshotToken, SourceTable
from phasewise.sources.decoding import MOMENTS, decode_text, explain_unfaithful, fail_where_null
from phasewise.sources.duckdb_file import find_lake_type, find_local_path

_NAME = re.compile(r"(?P<table>.+?)\.(?P<kind>csv|tsv|parquet|json|ndjson|jsonl)(?:\.(?:gz|zst))?", re.IGNORECASE)
_KINDS = {"tsv": "csv", "ndjson": "json", "jsonl": "json"}
_CHECKED = {"BIGINT", "DOUBLE", "BOOLEAN", "UUID", *MOMENTS}


@dataclass(frozen=True, kw_only=True)
class _Files:
    #: csv, json or parquet.
    kind: str
    paths: tuple[Path, ...]


class FilesSource:
    """A folder, or a pattern, of local files."""

    extensions: tuple[str, ...] = ()

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        self._url = url
        self._path = find_local_path(url, root)
        self._settings = settings

    @property
    def url(self) -> str:
        return redact_url(self._url)

    def check(self) -> None:
        self._find_tables()

    def list_tables(self) -> list[str]:
        return sorted(self._find_tables())

    def describe_table(self, name: str) -> SourceTable:
        files = self._find_files(name)
        with open_session(self._settings, extensions=()) as connection:
            try:
                names = _list_columns(connection, files)
            except duckdb.Error as exc:
                raise SourceUnavailable(
                    f'The files of table "{name}" cannot be read: {exc}', hint=f"Check {files.paths[0]}."
                ) from exc
        return SourceTable(name=name, columns=tuple(names))

    def can_carry(self, column: Column, type_name: str) -> bool:
        if column.source_type not in {"csv", "json"}:
            return type_name == "VARCHAR" and column.type != "BLOB"
        return type_name in _CHECKED or type_name.startswith("DECIMAL")

    @contextmanager
    def open_snapshot(self, folder: Path) -> Iterator[SnapshotToken | None]:
        """Note name, size and time of every file: a file that changes during the batch fails its table."""
        yield {"id": self._fingerprint()}

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        if snapshot is not None and snapshot["id"] != self._fingerprint():
            raise SourceUnavailable(
                f"The files of {self.url} have changed since the batch began.", hint="Start a new batch."
            )

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        connection.execute("BEGIN TRANSACTION")

    def select(self, table: SourceTable) -> str:
        columns = ", ".join(f"{_decode_or_fail(column)} AS {quote_identifier(column.name)}" for column in table.columns)
        return f"SELECT {columns} FROM {self._read(table)}{table.where()}"

    def count_rows(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, rows_read: int) -> int:
        row = connection.execute(f"SELECT count(*) FROM {self._read(table)}{table.where()}").fetchone()
        assert row is not None  # an aggregate has a row
        return int(row[0])

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide by files: a file is read by one partition, so a table of one file is none to divide."""
        del connection, table, limit
        return []

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        try:
            found = self._find_unfaithful(connection, table)
        except duckdb.Error:
            found = None
        return found or SourceError(f'Table "{table.name}" of {self.url} cannot be read: {error}')

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        keys = [quote_identifier(name) for name in table.key]
        for column in table.columns:
            if column.source_type not in {"csv", "json"}:
                continue
            value = quote_identifier(column.name)
            bad = f"FROM {self._read(table)}{table.where(f'{value} IS NOT NULL AND ({_decode(column)}) IS NULL')}"
            row = connection.execute(f"SELECT count(*) {bad}").fetchone()
            if row and row[0]:
                sample = connection.execute(f"SELECT {', '.join([value, *keys])} {bad} LIMIT 1").fetchone()
                assert sample is not None  # it was counted above
                where = ", ".join(f"{name} = {shown}" for name, shown in zip(table.key, sample[1:], strict=True))
                return explain_unfaithful(table.name, column, count=row[0], value=f"'{sample[0]}'", where=where)
        return None

    def _read(self, table: SourceTable) -> str:
        files = self._find_files(table.name)
        # Conditions may look at columns that are not read; of JSON only those are there that are asked for.
        columns = self.describe_table(table.name).columns if table.conditions else table.columns
        return _read_files(files, [column.name for column in columns])

    def _find_files(self, name: str) -> _Files:
        tables = self._find_tables()
        if name not in tables:
            raise TableMissing(name, hint=f"Looked in {self._path}. It has: {', '.join(sorted(tables)[:40])}.")
        return tables[name]

    def _find_tables(self) -> dict[str, _Files]:
        is_folder = self._path.is_dir()
        folder, pattern = (self._path, "*") if is_folder else (self._path.parent, self._path.name)
        if not folder.is_dir() or not (is_folder or any(folder.glob(pattern))):
            what = "No file matches" if folder.is_dir() else "There is no folder for"
            raise SourceUnavailable(f"{what} {self._path}.", hint="Check [source] url in phasewise.toml.")
        tables: dict[str, _Files] = {}
        for path in sorted(folder.glob(pattern)):
            name, files = _describe_path(path)
            if files is None:
                continue
            if name in tables:
                raise ProjectError(f'Two files of {folder} are the table "{name}".', hint="Rename one of them.")
            tables[name] = files
        return tables

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, files in sorted(self._find_tables().items()):
            for path in files.paths:
                stat = path.stat()
                digest.update(f"{name}\0{path}\0{stat.st_ino}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"files-{digest.hexdigest()[:16]}"


def _describe_path(path: Path) -> tuple[str, _Files | None]:
    if path.name.startswith((".", "_")):  # such as _SUCCESS, and files that are still being written
        return path.name, None
    if path.is_dir():
        inner = [(entry, match) for entry in sorted(path.iterdir()) if (match := _NAME.fullmatch(entry.name))]
        kinds = {_find_kind(match) for _, match in inner}
        if len(kinds) > 1:
            raise ProjectError(f"The folder {path} mixes {' and '.join(sorted(kinds))}.", hint="A table has one kind.")
        return path.name, _Files(kind=kinds.pop(), paths=tuple(entry for entry, _ in inner)) if inner else None
    match = _NAME.fullmatch(path.name)
    return (match["table"], _Files(kind=_find_kind(match), paths=(path,))) if match else (path.name, None)


def _find_kind(match: re.Match[str]) -> str:
    kind = match["kind"].lower()
    return _KINDS.get(kind, kind)


def _list_columns(connection: duckdb.DuckDBPyConnection, files: _Files) -> list[Column]:
    if files.kind == "json":
        paths = _quote_paths(files)
        rows = connection.execute(
            f"SELECT DISTINCT unnest(json_keys(json)) AS name FROM read_json_objects({paths}) ORDER BY name"
        ).fetchall()
        return [_describe_text(row[0], "json") for row in rows]
    described = connection.execute(f"DESCRIBE SELECT * FROM {_read_files(files, [])}").fetchall()
    if files.kind == "csv":
        return [_describe_text(row[0], "csv") for row in described]
    columns = []
    for name, declared, *_ in described:
        lake_type, note = find_lake_type(declared)
        columns.append(Column(name=name, source_type=declared, type=lake_type, nullable=True, note=note))
    return columns


def _describe_text(name: str, kind: str) -> Column:
    return Column(name=name, source_type=kind, type="VARCHAR", nullable=True, note=f"text: {kind} has no types")


def _read_files(files: _Files, names: list[str]) -> str:
    paths = _quote_paths(files)
    if files.kind == "parquet":
        return f"read_parquet({paths}, union_by_name = true)"
    if files.kind == "csv":
        # A quoted empty field is an empty text, an unquoted one is NULL.
        return f"read_csv({paths}, all_varchar = true, header = true, allow_quoted_nulls = false, union_by_name = true)"
    values = ", ".join(f"json ->> {quote_literal(_json_path(name))} AS {quote_identifier(name)}" for name in names)
    return f"(SELECT {values} FROM read_json_objects({paths}))"


def _json_path(name: str) -> str:
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"/{escaped}"


def _quote_paths(files: _Files) -> str:
    # DuckDB takes *, ? and [ in a path for a pattern; in brackets they are themselves.
    escaped = [re.sub(r"([*?\[])", r"[\1]", str(path)) for path in files.paths]
    return f"[{', '.join(quote_literal(path) for path in escaped)}]"


def _decode_or_fail(column: Column) -> str:
    value = quote_identifier(column.name)
    if column.source_type in {"csv", "json"} and column.type != "VARCHAR":
        return fail_where_null(_decode(column), value, column.type)
    return f"CAST({value} AS {column.type})"


def _decode(column: Column) -> str:
    value = quote_identifier(column.name)
    cast = f"TRY_CAST({value} AS {column.type})"
    if column.type in {"BIGINT", "BOOLEAN"}:
        return f"CASE WHEN CAST({cast} AS VARCHAR) = {value} THEN {cast} END"
    if match := re.fullmatch(r"DECIMAL\(\d+,(\d+)\)", column.type):
        fraction = rf"(\.\d{{1,{match[1]}}})?" if match[1] != "0" else ""
        return f"CASE WHEN regexp_full_match({value}, '-?\\d+{fraction}') THEN {cast} END"
    return decode_text(column.type, value) if column.type in {"UUID", *MOMENTS} else cast
