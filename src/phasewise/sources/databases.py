"""What sources share: DuckDB reads them all, and for databases on a server a scanner hands queries on to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import duckdb

from phasewise.errors import PhasewiseError, SourceError, SourceUnavailable, UnfaithfulValue
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_literal
from phasewise.lake.refusals import explain_refusal
from phasewise.lake.session import open_session
from phasewise.project.urls import redact_url
from phasewise.settings import Settings
from phasewise.sources.protocol import SnapshotToken, SourceTable, StagedRows


class DuckdbReader:
    """The part of a ``Source`` that is the same for all that DuckDB reads."""

    extensions: tuple[str, ...] = ()

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings
        self._attached: duckdb.DuckDBPyConnection | None = None

    @property
    def url(self) -> str:
        return redact_url(self._url)

    def check(self) -> None:
        with self._open():
            pass

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        raise NotImplementedError

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        connection.execute("BEGIN TRANSACTION")

    def count_rows(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, staged: StagedRows | None = None
    ) -> int:
        return fetch_int(connection, f"SELECT count(*) FROM {self._read(table)}{table.where()}")

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        try:
            found = self._find_unfaithful(connection, table)
        except duckdb.Error:
            found = None  # such as for a condition that the source does not understand
        return found or SourceError(f'Table "{table.name}" of {self.url} cannot be read: {error}')

    def _read(self, table: SourceTable) -> str:
        """Return the relation of all rows of *table*, where DuckDB counts them."""
        raise NotImplementedError

    def _find_unfaithful(self, connection: duckdb.DuckDBPyConnection, table: SourceTable) -> UnfaithfulValue | None:
        """Return the error for the first column with values that would change; None: there is none."""
        return None

    @contextmanager
    def _open(self) -> Iterator[duckdb.DuckDBPyConnection]:
        if self._attached is not None:  # an extraction describes its table in the session that it has
            yield self._attached
            return
        with open_session(self._settings, extensions=self.extensions) as connection:
            self.attach(connection)
            self._attached = None
            yield connection


class ServerSource(DuckdbReader):
    """The part of a ``Source`` that is the same for every server."""

    #: As people call it.
    kind: str
    #: DuckDB's function that hands a query on.
    query_function: str
    #: Part of a refused login's reason → what to do then.
    advice: Mapping[str, str]

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        found = super().explain(connection, table, error)
        if isinstance(found, UnfaithfulValue) or self._answers(connection):
            return found
        return SourceUnavailable(
            f"The {self.kind} database {self.url} stopped answering: {error}", hint="Retry once it is back."
        )

    def _query(self, sql: str) -> str:
        """Return the query for the rows of *sql*, which the server answers."""
        return f"SELECT * FROM {self.query_function}('source', {quote_literal(sql)})"

    def _answers(self, connection: duckdb.DuckDBPyConnection) -> bool:
        try:
            connection.execute(self._query("SELECT 1 AS one")).fetchone()
        except duckdb.Error:
            return False
        return True

    def _explain_refusal(self, exc: duckdb.Error) -> SourceUnavailable:
        reason, hint = explain_refusal(exc, "[source] url", self.advice)
        return SourceUnavailable(f"The {self.kind} database {self.url} does not answer: {reason}.", hint=hint)
