"""Files as a source: ``file:///relative/folder``, ``file:////absolute/folder``, ``file:///exports/2024-*.csv``.

On S3-compatible storage: ``s3://bucket/folder``, ``s3://bucket/exports/2024-*.csv``; the variables ``AWS_*`` say how.

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
from fnmatch import fnmatchcase
from pathlib import Path

import duckdb

from phasewise.errors import ProjectError, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.lake.object_store import create_storage_secret, is_stored, list_stored
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.project.urls import find_local_path, redact_url
from phasewise.settings import Settings
from phasewise.sources.databases import DuckdbReader
from phasewise.sources.decoding import MOMENTS, decode_text, explain_unfaithful, fail_where_null
from phasewise.sources.duckdb_file import BLOCK_ROWS, compare_typed, describe_column
from phasewise.sources.protocol import Column, SnapshotToken, SourceTable
from phasewise.sources.ranges import divide, find_bounds

_NAME = re.compile(r"(?P<table>.+?)\.(?P<kind>csv|tsv|parquet|json|ndjson|jsonl)(?:\.(?:gz|zst))?", re.IGNORECASE)
_KINDS = {"tsv": "csv", "ndjson": "json", "jsonl": "json"}
#: Else a folder such as ``year=2024`` above a file adds a column, or overwrites one.
_PLAIN_PATHS = "hive_partitioning = false"
_CHECKED = {"BIGINT", "DOUBLE", "BOOLEAN", "UUID", *MOMENTS}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One file: in the folder itself, or in a folder in it."""

    #: Names below the folder: that of the file, or those of its folder and of the file.
    names: tuple[str, ...]
    #: Path or URL.
    location: str
    #: Changes with what is in the file.
    mark: str


@dataclass(frozen=True, kw_only=True)
class _Files:
    #: csv, json or parquet.
    kind: str
    entries: tuple[_Entry, ...]


class FilesSource(DuckdbReader):
    """A folder, or a pattern, of files: local ones, or on S3."""

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        super().__init__(url, settings)
        #: A path, or a URL on S3.
        self._place = url.rstrip("/") if is_stored(url) else str(find_local_path(url, root))
        self.extensions = ("httpfs",) if is_stored(url) else ()
        if is_stored(url) and not re.match(r"s3://[^/?#@:]+($|/)", url):
            raise ProjectError(f'"{redact_url(url)}" names no bucket.', hint="Write s3://bucket/folder.")

    def check(self) -> None:
        self._find_tables()

    def list_tables(self) -> list[str]:
        return sorted(self._find_tables())

    def describe_table(self, name: str) -> SourceTable:
        files = self._find_files(name)
        with self._open() as connection:
            try:
                names = _list_columns(connection, files)
            except duckdb.Error as exc:
                raise SourceUnavailable(
                    f'The files of table "{name}" cannot be read: {exc}', hint=f"Check {files.entries[0].location}."
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
        if self.extensions:
            create_storage_secret(connection)
        self._attached = connection
        if snapshot is not None and snapshot["id"] != self._fingerprint():
            raise SourceUnavailable(
                f"The files of {self.url} have changed since the batch began.", hint="Start a new batch."
            )

    def select(self, table: SourceTable) -> str:
        columns = ", ".join(f"{_decode_or_fail(column)} AS {quote_identifier(column.name)}" for column in table.columns)
        return f"SELECT {columns} FROM {self._read(table)}{table.where()}"

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        name = quote_identifier(column.name)
        # What is no such value counts as NULL, is read, and fails there.
        value = f"TRY_CAST({name} AS {column.type})" if column.source_type in {"csv", "json"} else name
        return compare_typed(value, column.type, operator, mark)

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Divide Parquet: several files by their names, one by the numbers of its rows; no others.

        DuckDB then reads the files, or row groups, that are asked for. CSV and JSON files it reads from their start.
        """
        files = self._find_files(table.name)
        by = "filename" if len(files.entries) > 1 else "file_row_number"
        # DuckDB's own columns of these names give way to those of the file.
        is_taken = any(column.name.lower() == by for column in self.describe_table(table.name).columns)
        if files.kind != "parquet" or is_taken:
            return []
        footers = f"SELECT sum(num_rows) FROM parquet_file_metadata({_quote_paths(files)})"
        if fetch_int(connection, footers) <= limit:
            return []
        start = by if by == "filename" else f"{by} // {BLOCK_ROWS} * {BLOCK_ROWS}"
        counted = connection.execute(
            f"SELECT {start}, count(*) FROM {self._read(table)}{table.where()} GROUP BY 1 ORDER BY 1"
        ).fetchall()
        bounds = find_bounds([(number, rows) for number, (_, rows) in enumerate(counted)], limit)
        return divide([by], [[quote_literal(str(counted[number][0]))] for number in bounds])

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        keys = [quote_identifier(name) for name in table.key]
        for column in table.columns:
            if column.source_type not in {"csv", "json"}:
                continue
            value = quote_identifier(column.name)
            bad = f"FROM {self._read(table)}{table.where(f'{value} IS NOT NULL AND ({_decode(column)}) IS NULL')}"
            if count := fetch_int(connection, f"SELECT count(*) {bad}"):
                sample = connection.execute(f"SELECT {', '.join([value, *keys])} {bad} LIMIT 1").fetchone()
                assert sample is not None  # it was counted above
                return explain_unfaithful(table.name, column, table.key, (f"'{sample[0]}'", *sample[1:]), count=count)
        return None

    def _read(self, table: SourceTable) -> str:
        files = self._find_files(table.name)
        # Conditions may look at columns that are not read; of JSON only those are there that are asked for.
        columns = self.describe_table(table.name).columns if table.conditions else table.columns
        return _read_files(files, [column.name for column in columns])

    def _find_files(self, name: str) -> _Files:
        tables = self._find_tables()
        if name not in tables:
            raise TableMissing(name, hint=f"Looked in {self._place}. It has: {', '.join(sorted(tables)[:40])}.")
        return tables[name]

    def _find_tables(self) -> dict[str, _Files]:
        groups: dict[str, list[_Entry]] = {}
        for entry in self._list_entries():
            # Such as _SUCCESS, and files that are still being written.
            if not entry.names[0].startswith((".", "_")) and (name := _name_table(entry)):
                groups.setdefault(name, []).append(entry)
        return {name: _gather(name, entries) for name, entries in sorted(groups.items())}

    def _list_entries(self) -> list[_Entry]:
        found = self._list_stored() if self.extensions else _list_local(Path(self._place))
        if not found and not Path(self._place).is_dir():
            raise SourceUnavailable(f"No file matches {self._place}.", hint="Check [source] url in phasewise.toml.")
        return sorted(found, key=lambda entry: entry.names)

    def _list_stored(self) -> list[_Entry]:
        folder, _, last = self._place.rpartition("/")
        is_pattern = bool(set(last) & set("*?[")) or _NAME.fullmatch(last) is not None
        folder, pattern = (folder, last) if is_pattern else (self._place, "*")
        try:
            with self._open() as connection:
                listed = list_stored(connection, f"{_escape(folder)}/**")
        except duckdb.Error as exc:
            raise SourceUnavailable(
                f"{self._place} cannot be listed: {str(exc).splitlines()[0]}",
                hint="Check [source] url in phasewise.toml, and the variables AWS_* where commands and workers run.",
            ) from exc
        found = []
        for file, item in listed.items():
            names = tuple(file.url.removeprefix(f"{folder}/").split("/"))
            if len(names) <= 2 and names[-1] and fnmatchcase(names[0], pattern):
                found.append(
                    _Entry(names=names, location=file.url, mark=f"{item.size_bytes} {item.modified_at.isoformat()}")
                )
        return found

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, files in self._find_tables().items():
            for entry in files.entries:
                digest.update(f"{name}\0{entry.location}\0{entry.mark}\n".encode())
        return f"files-{digest.hexdigest()[:16]}"


def _list_local(place: Path) -> list[_Entry]:
    is_folder = place.is_dir()
    folder, pattern = (place, "*") if is_folder else (place.parent, place.name)
    if not folder.is_dir():
        raise SourceUnavailable(f"There is no folder for {place}.", hint="Check [source] url in phasewise.toml.")
    inner = [file for path in folder.glob(pattern) for file in (path.iterdir() if path.is_dir() else [path])]
    return [_describe_local(path, path.relative_to(folder).parts) for path in inner]


def _describe_local(path: Path, names: tuple[str, ...]) -> _Entry:
    stat = path.stat()
    return _Entry(names=names, location=str(path), mark=f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}")


def _name_table(entry: _Entry) -> str | None:
    """Return the table that a file belongs to; None for a file of no kind that is known."""
    match = _NAME.fullmatch(entry.names[-1])
    if match is None:
        return None
    return match["table"] if len(entry.names) == 1 else entry.names[0]


def _gather(name: str, entries: list[_Entry]) -> _Files:
    folders = {entry.names[:-1] for entry in entries}
    if len(folders) > 1 or (folders == {()} and len(entries) > 1):
        places = " and ".join(entry.location for entry in entries[:2])
        raise ProjectError(f'Two files of one folder are the table "{name}": {places}.', hint="Rename one of them.")
    found = {match["kind"].lower() for entry in entries if (match := _NAME.fullmatch(entry.names[-1]))}
    kinds = {_KINDS.get(kind, kind) for kind in found}
    if len(kinds) > 1:
        raise ProjectError(f'The folder "{name}" mixes {" and ".join(sorted(kinds))}.', hint="A table has one kind.")
    return _Files(kind=kinds.pop(), entries=tuple(entries))


def _list_columns(connection: duckdb.DuckDBPyConnection, files: _Files) -> list[Column]:
    if files.kind == "json":
        paths = _quote_paths(files)
        objects = f"read_json_objects({paths}, {_PLAIN_PATHS})"
        rows = connection.execute(
            f"SELECT DISTINCT unnest(json_keys(json)) AS name FROM {objects} ORDER BY name"
        ).fetchall()
        return [_describe_text(row[0], "json") for row in rows]
    described = connection.execute(f"DESCRIBE SELECT * FROM {_read_files(files, [])}").fetchall()
    if files.kind == "csv":
        return [_describe_text(row[0], "csv") for row in described]
    return [describe_column(name, declared, True) for name, declared, *_ in described]


def _describe_text(name: str, kind: str) -> Column:
    return Column(name=name, source_type=kind, type="VARCHAR", nullable=True, note=f"text: {kind} has no types")


def _read_files(files: _Files, names: list[str]) -> str:
    paths = _quote_paths(files)
    if files.kind == "parquet":
        return f"read_parquet({paths}, {_PLAIN_PATHS}, union_by_name = true)"
    if files.kind == "csv":
        # A quoted empty field is an empty text, an unquoted one is NULL. DuckDB would guess from 20,480 rows what
        # quotes are and whether rows are comments: a quote that comes later then stays in its value, and a row that
        # begins with # is left out. To try all that out is most of what it takes to read a small file, too.
        options = "all_varchar = true, header = true, allow_quoted_nulls = false, union_by_name = true"
        return f"""read_csv({paths}, {_PLAIN_PATHS}, {options}, quote = '"', escape = '"', comment = '')"""
    values = ", ".join(f"json ->> {quote_literal(_json_path(name))} AS {quote_identifier(name)}" for name in names)
    return f"(SELECT {values} FROM read_json_objects({paths}, {_PLAIN_PATHS}))"


def _json_path(name: str) -> str:
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"/{escaped}"


def _quote_paths(files: _Files) -> str:
    # DuckDB takes *, ? and [ in a path for a pattern; in brackets they are themselves.
    return f"[{', '.join(quote_literal(_escape(entry.location)) for entry in files.entries)}]"


def _escape(location: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", location)


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
