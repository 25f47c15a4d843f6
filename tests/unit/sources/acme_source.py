"""A source as somebody else would write it in a package of his own: ``acme:///log.jsonl``, lines of all tables.

A line with an id is a row; one without says only that there is a table.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from phasewise.errors import PhasewiseError, ProjectError, SourceError, SourceUnavailable, TableMissing
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.settings import Settings
from phasewise.sources import Column, SnapshotToken, SourceTable, StagedRows

COLUMNS = (
    Column(name="id", source_type="number", type="BIGINT", nullable=False),
    Column(name="label", source_type="string", type="VARCHAR", nullable=True),
)


class AcmeSource:
    extensions: tuple[str, ...] = ()

    def __init__(self, url: str, root: Path, settings: Settings) -> None:
        self.url = url
        self._path = root / url.removeprefix("acme:///")

    def check(self) -> None:
        if not self._path.is_file():
            raise SourceUnavailable(f"The log {self._path} does not exist.")

    def list_tables(self) -> list[str]:
        self.check()
        return sorted({json.loads(line)["table"] for line in self._path.read_text(encoding="utf-8").splitlines()})

    def describe_table(self, name: str) -> SourceTable:
        if name not in self.list_tables():
            raise TableMissing(name)
        return SourceTable(name=name, columns=COLUMNS, key=("id",))

    def can_carry(self, column: Column, type_name: str) -> bool:
        return type_name == "VARCHAR"

    @contextmanager
    def open_snapshot(self, folder: Path) -> Iterator[SnapshotToken]:
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / "log.jsonl"
        copy.write_bytes(self._path.read_bytes())
        yield {"id": uuid.uuid4().hex, "path": str(copy)}

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        self._path = Path(snapshot["path"]) if snapshot else self._path
        self.check()

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        connection.execute("BEGIN TRANSACTION")

    def select(self, table: SourceTable) -> str:
        columns = ", ".join(
            f"CAST({name} AS {column.type}) AS {name}"
            for column in table.columns
            for name in [quote_identifier(column.name)]
        )
        return f"SELECT {columns} FROM {self._rows(table)}{table.where()}"

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        raise ProjectError("The log has no cursors.")

    def count_rows(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, staged: StagedRows | None = None
    ) -> int:
        row = connection.execute(f"SELECT count(*) FROM {self._rows(table)}{table.where()}").fetchone()
        assert row is not None
        return int(row[0])

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        return []

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        return SourceError(f'Table "{table.name}" of {self.url} cannot be read: {error}')

    def _rows(self, table: SourceTable) -> str:
        columns = "{'table': 'VARCHAR', 'id': 'BIGINT', 'label': 'VARCHAR'}"
        lines = f"read_json({quote_literal(str(self._path))}, format = 'newline_delimited', columns = {columns})"
        return f'(SELECT id, label FROM {lines} WHERE "table" = {quote_literal(table.name)} AND id IS NOT NULL)'
