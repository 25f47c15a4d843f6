"""The tables of a project, as its contract in phasewise.toml wants them."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Mapping, Sequence

from phasewise.errors import PhasewiseError, ProjectError, SchemaDrift, SourceError
from phasewise.lake.session import normalize_type
from phasewise.project.config import Project, Table
from phasewise.settings import Settings
from phasewise.sources.protocol import Column, Source, SourceTable
from phasewise.sources.registry import open_source


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
    problems = []
    for name in tables:
        try:
            describe_project_table(project, source, name)
        except PhasewiseError as exc:
            problems.append(exc)
    return problems


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
    declared = f"{column.source_type or 'no type'} in the source, {column.type} in the warehouse"
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
