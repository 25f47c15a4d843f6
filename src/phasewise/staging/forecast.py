"""What the next batch would load of each table, found out without loading anything."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb

from phasewise.errors import PhasewiseError, SourceError
from phasewise.lake.session import open_session
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.sources import Source, SourceTable, describe_project_table, list_project_tables, open_source
from phasewise.staging.load_plan import LakeView, Load, plan_load, read_lake, select_new_rows


@dataclass(frozen=True, kw_only=True)
class TableForecast:
    """What would be loaded of one table."""

    table: str
    mode: str
    #: Rows beyond this cursor; None: all.
    since: str | None = None
    #: Of an increment counted by the source, else its own estimate; None: it has none.
    rows: int | None = None
    #: Why the whole table is read, and what changed in its columns.
    notes: tuple[str, ...] = ()
    #: Why it could not be loaded.
    problem: str | None = None


def forecast_tables(project: Project, settings: Settings) -> list[TableForecast]:
    """Return what the next batch would load, in the order of the tables' names.

    Raises:
        SourceUnavailable: the source does not answer.
        LakeError: the warehouse cannot be read.
    """
    view = read_lake(project, settings)
    source = open_source(project, settings)
    tables = list_project_tables(project, source)
    with open_session(settings, extensions=source.extensions) as connection:
        source.attach(connection)
        return [_forecast(connection, project, source, view, table) for table in tables]


def _forecast(
    connection: duckdb.DuckDBPyConnection, project: Project, source: Source, view: LakeView, name: str
) -> TableForecast:
    contract = project.find_table(name)
    try:
        table = describe_project_table(project, source, name)
        load = plan_load(contract, table, view.find(name))
        return TableForecast(
            table=name,
            mode=load.mode,
            since=load.since,
            rows=table.row_estimate if load.reads_all else _count(connection, source, table, load),
            notes=load.describe(),
        )
    except PhasewiseError as exc:
        return TableForecast(table=name, mode=contract.mode, problem=str(exc))


def _count(connection: duckdb.DuckDBPyConnection, source: Source, table: SourceTable, load: Load) -> int:
    new = select_new_rows(source, table, load)
    try:
        source.begin(connection, new)
        rows = source.count_rows(connection, new)
        connection.execute("COMMIT")
    except duckdb.Error as exc:
        connection.execute("ROLLBACK")
        raise SourceError(f'The new rows of table "{table.name}" cannot be counted: {exc}') from exc
    except PhasewiseError:
        connection.execute("ROLLBACK")
        raise
    return rows
