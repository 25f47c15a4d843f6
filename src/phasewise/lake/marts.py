"""Marts: SQL models over the published tables, built in the order in which they need one another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Literal

import duckdb

from phasewise.errors import ProjectError
from phasewise.lake.publications import list_tables
from phasewise.lake.queries import (
    JsonValue,
    check_select,
    fetch_int,
    fetch_rows,
    find_missing_tables,
    first_line,
    list_tables_read,
    strip_select,
)
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.project.config import Mart, Project

#: Schema of the lake that holds the marts; the tables stand in ``main``.
MARTS_SCHEMA = "marts"


@dataclass(frozen=True, kw_only=True)
class MartData:
    """One mart as the report shows it."""

    name: str
    title: str
    #: What to draw of the columns *x* and *y*.
    chart: Literal["bar", "line", "scatter"]
    x: str | None
    y: str | None
    columns: tuple[str, ...]
    #: The first rows; *total_rows* counts all of them.
    rows: tuple[tuple[JsonValue, ...], ...]
    total_rows: int


def order_marts(marts: Sequence[Mart]) -> list[Mart]:
    """Return *marts* so that each comes after the marts that it reads; in name order where that leaves a choice.

    Raises:
        ProjectError: one is not a single SELECT, or they need one another in a circle.
    """
    by_name = {mart.name.casefold(): mart for mart in sorted(marts, key=lambda mart: mart.name)}
    with duckdb.connect() as parser:
        needs = {name: _list_needs(parser, mart, by_name) for name, mart in by_name.items()}
    try:
        return [by_name[name] for name in TopologicalSorter(needs).static_order()]
    except CycleError as exc:
        circle = " → ".join(by_name[name].name for name in exc.args[1])
        raise ProjectError(f"The marts need one another in a circle: {circle}.") from None


def find_buildable(connection: duckdb.DuckDBPyConnection, project: Project, tables: Collection[str]) -> list[Mart]:
    """Return, in building order, the marts that need nothing but *tables* and other buildable marts."""
    present = set(tables)
    buildable: list[Mart] = []
    for mart in order_marts(project.marts):
        if not find_missing_tables(connection, mart.sql, present):
            buildable.append(mart)
            present.add(mart.name)
    return buildable


def build_marts(connection: duckdb.DuckDBPyConnection, marts: Sequence[Mart]) -> None:
    """Build *marts*, which ``order_marts`` has ordered, as tables of the attached lake, in place of those that it has.

    Runs in the caller's transaction and sees its uncommitted tables. In a mart's SQL a bare name is a published table
    or, where no table has that name, another mart.

    Raises:
        ProjectError: the SQL of a mart fails; the message names its file and says what DuckDB said.
    """
    schema = f"lake.{MARTS_SCHEMA}"
    _drop_others(connection, schema, keep=[mart.name for mart in marts])
    before = connection.execute("select current_setting('search_path')").fetchone()
    connection.execute(f"set search_path = {quote_literal(f'lake.main,{schema}')}")
    for mart in marts:
        _build_mart(connection, mart, schema)
    connection.execute(f"set search_path = {quote_literal(str(before[0]) if before else '')}")


def read_mart(connection: duckdb.DuckDBPyConnection, mart: Mart, limit: int = 1000) -> MartData:
    """Return the first *limit* rows of a mart of the attached lake, in the order that its SELECT gave.

    Raises:
        ProjectError: the mart was not built yet, or its header names a column that it does not have.
    """
    target = f"lake.{MARTS_SCHEMA}.{quote_identifier(mart.name)}"
    try:
        data = fetch_rows(connection, f"from {target}", limit=limit)
    except duckdb.CatalogException as exc:
        raise ProjectError(
            f'The mart "{mart.name}" is not in the warehouse.', hint="The next batch builds it: make run-distributed"
        ) from exc
    return MartData(
        name=mart.name,
        title=mart.title or mart.name,
        chart=mart.chart,
        x=_find_column(mart, "x", mart.x, data.columns),
        y=_find_column(mart, "y", mart.y, data.columns),
        columns=data.columns,
        rows=data.rows,
        total_rows=fetch_int(connection, f"select count(*) from {target}"),
    )


def _list_needs(parser: duckdb.DuckDBPyConnection, mart: Mart, marts: Mapping[str, Mart]) -> set[str]:
    check_select(mart.sql, where=_file(mart))
    read = list_tables_read(parser, mart.sql)
    names = {table.name.casefold() for table in read if table.schema.casefold() in ("", MARTS_SCHEMA)}
    # A mart that reads its own name means the table of that name.
    return (names & marts.keys()) - {mart.name.casefold()}


def _build_mart(connection: duckdb.DuckDBPyConnection, mart: Mart, schema: str) -> None:
    target = f"{schema}.{quote_identifier(mart.name)}"
    try:
        connection.execute(f"create or replace table {target} as {_storable_select(connection, mart)}")
    except duckdb.Error as exc:
        raise ProjectError(f"{_file(mart)} failed: {first_line(exc)}") from exc


def _storable_select(connection: duckdb.DuckDBPyConnection, mart: Mart) -> str:
    """Return the mart's SELECT with 128-bit integers (what ``sum`` of integers gives) as decimals.

    Parquet has no such integers: DuckDB 1.5 would write doubles, which are wrong from 2^53 on.
    """
    columns = connection.execute(f"describe {mart.sql}").fetchall()
    casts = [
        f"{quote_identifier(name)}::decimal(38, 0) as {quote_identifier(name)}"
        for name, type_, *_ in columns
        if type_ in ("HUGEINT", "UHUGEINT")
    ]
    return f"select * replace ({', '.join(casts)}) from (\n{strip_select(mart.sql)}\n)" if casts else mart.sql


def _drop_others(connection: duckdb.DuckDBPyConnection, schema: str, *, keep: Sequence[str]) -> None:
    """Drop the tables of *schema* that are no longer marts of the project."""
    connection.execute(f"create schema if not exists {schema}")
    kept = {name.casefold() for name in keep}
    for name in list_tables(connection, schema):
        if name.casefold() not in kept:
            connection.execute(f"drop table {schema}.{quote_identifier(name)}")


def _find_column(mart: Mart, header: str, name: str | None, columns: Sequence[str]) -> str | None:
    """Return *name* as the mart spells it."""
    if name is None:
        return None
    found = [column for column in columns if column.casefold() == name.casefold()]
    if not found:
        raise ProjectError(
            f'{_file(mart)}: the header "{header}: {name}" names no column of the mart.',
            hint=f"It has: {', '.join(columns)}.",
        )
    return found[0]


def _file(mart: Mart) -> str:
    return f"marts/{mart.name}.sql"
