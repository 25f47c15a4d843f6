"""Source databases: what any of them must do, and which of them serves a URL.

A source is found by the scheme of its URL. Phasewise has its own (see ``_BUILT_IN``); a package adds another with
an entry point of the group ``phasewise.sources``, whose name is the scheme and whose object is called as
``factory(url, root, settings)`` and returns a ``Source``.

Never reaches Prefect. ``staging`` and what is above may import it. It runs in the processes that read tables.

The rule that every source keeps: **nothing changes silently**. A value arrives in the lake as it was, or its
column is carried as text and says so (``Column.note``), or the extraction fails and names the column, a sample
row and the option that decides. That option is the contract in phasewise.toml: ``columns = { hits = "VARCHAR" }``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import duckdb

from phasewise.errors import PhasewiseError, ProjectError, SchemaDrift, SourceError
from phasewise.lake.object_store import File
from phasewise.lake.session import normalize_type
from phasewise.project.config import Project, Table, redact_url
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

_BUILT_IN = {
    "duckdb": "phasewise.sources.duckdb_file:DuckdbSource",
    "file": "phasewise.sources.files:FilesSource",
    "mariadb": "phasewise.sources.mysql:MysqlSource",
    "mysql": "phasewise.sources.mysql:MysqlSource",
    "postgres": "phasewise.sources.postgres:PostgresSource",
    "postgresql": "phasewise.sources.postgres:PostgresSource",
    "s3": "phasewise.sources.files:FilesSource",
    "sqlite": "phasewise.sources.sqlite:SqliteSource",
}


def find_moment(token: SnapshotToken | None, table: str) -> tuple[SnapshotToken | None, str | None]:
    """Return the moment at which *table* is read in this process, None for one of its own; and the reason for that."""
    if token is None:
        return None, None
    if token["id"] is None:
        return None, token.get("remark")
    if table in token.get("without", ()):
        return None, "its engine has no transactions"
    here = platform.node()
    if token.get("machine", here) != here:
        return None, f"the batch's moment is held on {token['machine']}, and this table was read on {here}"
    return token, None


def open_source(project: Project, settings: Settings) -> Source:
    """Return the project's source. It is not connected to yet.

    Raises:
        ProjectError: no source serves the URL's scheme, or the URL is malformed.
    """
    url = project.source.url
    scheme = url.partition(":")[0].lower()
    return _find_factory(scheme, url)(url, project.root, settings)


def list_project_tables(project: Project, source: Source) -> list[str]:
    """Return the tables of the project, in name order.

    Those of the source that the globs of ``[tables]`` select; a name without wildcards in ``include`` and a table
    with a section of its own are listed too when the source does not list them: a view is selected so, and a
    table that is missing fails by its name rather than being forgotten.

    Raises:
        ProjectError: two tables differ by case only.
    """
    selection = project.tables
    named = {pattern for pattern in selection.include if not set(pattern) & set("*?[")} | set(project.table)
    wanted = {name for name in source.list_tables() if _matches(name, selection.include)} | named
    tables = sorted(name for name in wanted if not _matches(name, selection.exclude))
    for first, second in itertools.pairwise(sorted(tables, key=str.casefold)):
        if first.casefold() == second.casefold():
            raise ProjectError(
                f'The tables "{first}" and "{second}" differ by case only, which the warehouse cannot tell apart.',
                hint="Leave one of them out: [tables] exclude.",
            )
    return tables


def describe_project_table(project: Project, source: Source, name: str) -> SourceTable:
    """Return the table with the types and the key that the project's contract gives it.

    Raises:
        TableMissing: the source has no such table.
        SchemaDrift: a column of the contract or key is missing, or cannot arrive in the type of the contract;
            the message names each.
    """
    return apply_contract(source, source.describe_table(name), project.find_table(name))


def apply_contract(source: Source, table: SourceTable, contract: Table) -> SourceTable:
    """Return *table* as *contract* wants it, or raise SchemaDrift naming everything that does not fit."""
    table = _select_columns(table, contract)
    _check_columns(source, table)
    types = {name: normalize_type(text) for name, text in contract.columns.items()}
    problems = [problem for name, wanted in types.items() if (problem := _find_drift(source, table, name, wanted))]
    problems += [
        f'the key column "{name}" is missing'
        for name in contract.key
        if name not in types and table.find_column(name) is None
    ]
    problems += [f'the column "{name}" is missing' for name in contract.only if _is_missing(table, name, types)]
    if problems:
        raise SchemaDrift(
            f'Table "{table.name}" does not fit its contract: {"; ".join(problems)}.',
            hint=f'Change the source, or the section [table."{table.name}"] of phasewise.toml.',
        )
    columns = tuple(_carry(column, types.get(column.name)) for column in table.columns)
    conditions = (*table.conditions, *((contract.where,) if contract.where else ()))
    return dataclasses.replace(
        table, columns=columns, key=contract.key or table.key, cursor=contract.cursor, conditions=conditions
    )


def check_project(project: Project, settings: Settings) -> list[PhasewiseError]:
    """Return everything that would make an extraction fail and can be known beforehand; empty when all is well.

    The source answers; every table of the project exists with the columns and types of its contract.
    """
    try:
        source = open_source(project, settings)
        source.check()
        tables = list_project_tables(project, source)
    except PhasewiseError as exc:
        return [exc]
    if not tables:
        return [ProjectError("The project selects no table of its source.", hint="Check [tables] in phasewise.toml.")]
    return [problem for name in tables if (problem := _check_table(project, source, name))]


def _check_columns(source: Source, table: SourceTable) -> None:
    """Raise SourceError for a table that no table of the lake can be like."""
    names = [column.name for column in table.columns]
    twice = [name for name in names if [other.casefold() for other in names].count(name.casefold()) > 1]
    problem = None
    if not names:
        problem = "has no columns"
    elif "" in names:
        problem = "has a column whose name is empty, which DuckDB cannot hold"
    elif twice:
        problem = f"has columns that differ by case only ({', '.join(twice)}), which DuckDB cannot tell apart"
    if problem:
        raise SourceError(
            f'Table "{table.name}" of {source.url} {problem}.',
            hint="Rename the column, or leave the table out: [tables] exclude.",
        )


def _check_table(project: Project, source: Source, name: str) -> PhasewiseError | None:
    try:
        describe_project_table(project, source, name)
    except PhasewiseError as exc:
        return exc
    return None


def _select_columns(table: SourceTable, contract: Table) -> SourceTable:
    """Return *table* with the columns that are loaded; without its key where a column of that is left out."""
    columns = tuple(
        column
        for column in table.columns
        if _matches(column.name, contract.only or ("*",)) and not _matches(column.name, contract.exclude)
    )
    names = {column.name for column in columns}
    return dataclasses.replace(table, columns=columns, key=table.key if names.issuperset(table.key) else ())


def _is_missing(table: SourceTable, pattern: str, types: Mapping[str, str]) -> bool:
    is_name = not set(pattern) & set("*?[")
    return is_name and pattern not in types and table.find_column(pattern) is None


def _find_drift(source: Source, table: SourceTable, name: str, wanted: str) -> str | None:
    column = table.find_column(name)
    if column is None:
        return f'the column "{name}" is missing'
    if wanted == column.type or source.can_carry(column, wanted):
        return None
    declared = f"{column.source_type or 'no type'} in the source, {column.type} in the lake"
    return f'the column "{name}" is {declared}, not {wanted}'


#: Formats without types: all that is known of a column is that it can be read as a text.
_UNTYPED = {"csv", "json"}


def _carry(column: Column, wanted: str | None) -> Column:
    if wanted == column.type and column.source_type in _UNTYPED:
        return dataclasses.replace(column, note=None)  # the contract says that it is a text indeed
    if wanted is None or wanted == column.type:
        return column
    note = f"carried as {wanted} because the contract says so; naturally {column.type}"
    return dataclasses.replace(column, type=wanted, note=note)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _find_factory(scheme: str, url: str) -> SourceFactory:
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        factory: SourceFactory = getattr(importlib.import_module(module), name)
        return factory
    found = metadata.entry_points(group="phasewise.sources", name=scheme)
    for entry_point in found:
        loaded: SourceFactory = entry_point.load()
        return loaded
    raise ProjectError(
        f'No source serves the URL "{redact_url(url)}".',
        hint=f"Known schemes: {', '.join(sorted({*_BUILT_IN, *_list_added()}))}.",
    )


def _list_added() -> list[str]:
    return [entry_point.name for entry_point in metadata.entry_points(group="phasewise.sources")]


__all__ = [
    "Column",
    "SnapshotToken",
    "Source",
    "SourceFactory",
    "SourceTable",
    "apply_contract",
    "check_project",
    "describe_project_table",
    "find_moment",
    "list_project_tables",
    "open_source",
]
