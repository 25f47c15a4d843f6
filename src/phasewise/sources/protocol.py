"""What any source must do, and the records in which it describes its tables."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import duckdb

from phasewise.errors import PhasewiseError
from phasewise.lake.object_store import File
from phasewise.settings import Settings

#: What ``open_snapshot`` hands to the processes that read: small, JSON-able, without secrets. Its ``id`` is equal
#: for those tables, and only those, that were read at the same moment; None where none could be held. Optional are
#: ``remark``, what whoever runs the batch should know of it; ``machine``, where only processes of that one can enter
#: the moment; and ``without``, tables that it does not hold.
SnapshotToken = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column on its way from the source to the lake."""

    name: str
    #: As the source declares it; empty when it declares none.
    source_type: str
    #: DuckDB type in the lake.
    type: str
    nullable: bool
    #: What the reader of the lake should know, such as: carried as text, and why.
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceTable:
    """One table as it will be extracted."""

    name: str
    columns: tuple[Column, ...]
    #: The primary key of the source, or the key that the project states.
    key: tuple[str, ...] = ()
    #: The column that the project states as its cursor.
    cursor: str | None = None
    #: Rows, roughly, where the source knows without counting.
    row_estimate: int | None = None
    #: Conditions in the SQL of the source, all of which hold for the rows that are read and counted.
    conditions: tuple[str, ...] = ()

    def where(self, *more: str) -> str:
        """Return the WHERE clause, a space before it, for the conditions and *more*; empty where there are none."""
        # The line's end closes a comment that a user's condition may end with.
        conditions = " AND ".join(f"({condition}\n)" for condition in (*self.conditions, *more))
        return f" WHERE {conditions}" if conditions else ""

    def find_column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.name == name), None)


@dataclass(frozen=True, kw_only=True)
class StagedRows:
    """The rows of a table as they were read, for the source that counts them."""

    #: How many they are, for a source that cannot count at the very same moment.
    rows: int
    #: The Parquet file with them: its footer may tell which values a source need not look for.
    file: File


class Source(Protocol):
    """One source database.

    ``check`` to ``describe_table`` ask the source itself; ``attach`` to ``explain`` work in a DuckDB session that
    has the extensions loaded. Between ``begin`` and the session's commit everything is read at one moment.
    """

    #: DuckDB extensions that the session needs.
    extensions: tuple[str, ...]

    @property
    def url(self) -> str:
        """The URL without its password."""

    def check(self) -> None:
        """Raise SourceUnavailable unless the source answers."""

    def list_tables(self) -> list[str]:
        """Return the names of the tables, without views, in name order."""

    def describe_table(self, name: str) -> SourceTable:
        """Return columns (with the lake's natural type for each) and primary key; views too.

        Raises:
            TableMissing: the source has no such table.
            SourceUnavailable: it does not answer.
        """

    def can_carry(self, column: Column, type_name: str) -> bool:
        """Tell whether values of *column* can arrive faithfully as the DuckDB type *type_name*, each one checked."""

    def open_snapshot(self, folder: Path) -> AbstractContextManager[SnapshotToken | None]:
        """Hold one moment of the whole source for other processes; *folder* is there for what must be kept.

        Yields None where the source cannot.
        """

    def attach(self, connection: duckdb.DuckDBPyConnection, snapshot: SnapshotToken | None = None) -> None:
        """Attach the source, read-only, as ``source``.

        From then on this object serves that one session, and describes tables as they are in *snapshot*.
        """

    def begin(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, snapshot: SnapshotToken | None = None
    ) -> None:
        """Begin the transaction in which *table* is read, at *snapshot* when one is held."""

    def select(self, table: SourceTable) -> str:
        """Return the query whose rows are the table's, in the types of its columns: those that its conditions hold for.

        The conditions are SQL of the source's own dialect, over all of its columns, also those that are not read.
        """

    def compare_cursor(self, column: Column, operator: str, mark: str) -> str:
        """Return a condition in the SQL of the source that compares *column* with *mark*, which DuckDB printed.

        *operator* is ``>``, ``>=``, or ``IS NULL`` without a mark. The order is DuckDB's for the type of the column,
        whatever collation the source has; a value that the type cannot hold is never left out.

        Raises:
            ProjectError: the source cannot compare such columns.
        """

    def count_rows(
        self, connection: duckdb.DuckDBPyConnection, table: SourceTable, staged: StagedRows | None = None
    ) -> int:
        """Return the rows that the conditions hold for, as the source counts them, at the moment of the transaction.

        *staged* is what the scan gave; None: nothing was read.

        Raises:
            UnfaithfulValue: the source knows of values that the rows read before do not show.
        """

    def split(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, limit: int) -> list[str]:
        """Return conditions that divide the table's rows into parts of like size, of about *limit* rows at most.

        Every row fulfils exactly one of them, also one that comes later. Empty where the table has no more rows than
        that, or the source nothing to divide it by.
        """

    def explain(self, connection: duckdb.DuckDBPyConnection, table: SourceTable, error: Exception) -> PhasewiseError:
        """Return what a failed ``select`` means: column, sample row and what to do. The transaction has ended."""


SourceFactory = Callable[[str, Path, Settings], Source]


def find_snapshot(token: SnapshotToken | None, table: str) -> tuple[SnapshotToken | None, str | None]:
    """Return the source snapshot at which *table* is read in this process, None for one of its own; and why that is."""
    if token is None:
        return None, None
    if token["id"] is None:
        return None, token.get("remark")
    if table in token.get("without", ()):
        return None, "its engine has no transactions"
    here = platform.node()
    if token.get("machine", here) != here:
        return None, f"the batch's snapshot is held on {token['machine']}, and this table was read on {here}"
    return token, None
