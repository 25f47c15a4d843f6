"""How a batch loads each table: whole, or only what is new since the batch that the lake shows.

What the lake remembers of a table's last load (``TableState``: above all how far its cursor was read) is written by
the transaction that publishes it, so that it is rolled back together with the rows. What a batch starts from is
written into its folder once, when it begins: a resumed batch reads the same range.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

import duckdb

from phasewise.errors import ProjectError, SchemaDrift
from phasewise.lake.publications import TableState, latest_publication, list_columns, list_tables
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, has_lake, list_extensions
from phasewise.project.config import Mode, Project, Table
from phasewise.settings import Settings
from phasewise.sources import Source, SourceTable
from phasewise.staging.schema_drift import Drift, compare_columns, find_lowest, is_integer, refuse_drift

#: The columns that a table of mode ``history`` has beyond the source's: when a row was first seen, when it was no
#: longer so (NULL while it is), and whether it is so now.
HISTORY = {"valid_from": "TIMESTAMP WITH TIME ZONE", "valid_to": "TIMESTAMP WITH TIME ZONE", "is_current": "BOOLEAN"}

_NUMBERS = re.compile(r"U?(TINYINT|SMALLINT|INTEGER|BIGINT)|DECIMAL\(\d+,\d+\)")
_MOMENTS = {"DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"}


@dataclass(frozen=True, kw_only=True)
class LakeTable:
    """One table of the lake as it is when a batch begins."""

    #: Column → type.
    columns: dict[str, str]
    #: None where its last load left nothing to continue from.
    state: TableState | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a batch loads one table."""

    mode: Mode = "full"
    key: tuple[str, ...] = ()
    cursor: str | None = None
    where: str | None = None
    version: int = 1
    #: Whether deleted rows are looked for.
    deletes: bool = False
    #: True: what was staged takes the place of the lake's table.
    is_replaced: bool = True
    #: Why the table is loaded whole though its mode is another; empty otherwise.
    reason: str = ""
    #: Rows whose cursor is beyond this are read, or equal to it where the table has a key; None: all rows.
    since: str | None = None
    #: The cursor that the batches before had reached, where this one continues from it.
    mark: str | None = None
    #: The highest cursor read so far, this batch included; None: there was none.
    until: str | None = None
    #: What the lake knew of the table when the batch began; it must know the same when the batch is published.
    base: TableState | None = None
    #: What changed in the columns since then.
    drift: tuple[str, ...] = ()

    @property
    def reads_all(self) -> bool:
        return self.since is None

    def describe(self) -> tuple[str, ...]:
        """Return what a reader of the report should know."""
        whole = (f"read whole: {self.reason}",) if self.reason else ()
        return (*whole, *self.drift)

    def state_after(self, table: str, batch: str, until: str | None) -> TableState:
        """Return what the lake remembers once this load is published."""
        return TableState(
            table=table,
            mode=self.mode,
            key=self.key,
            cursor=self.cursor,
            where=self.where,
            version=self.version,
            mark=until,
            batch=batch,
        )


@dataclass(frozen=True, kw_only=True)
class LakeView:
    """The tables of the lake that a batch starts from, by casefolded name."""

    tables: dict[str, LakeTable] = field(default_factory=dict)

    def find(self, table: str) -> LakeTable | None:
        return self.tables.get(table.casefold())


def read_lake(project: Project, settings: Settings) -> LakeView:
    """Return the tables of the lake as they are now; none while there is no lake."""
    if not has_lake(project):
        return LakeView()
    with open_session(settings, extensions=list_extensions(project)) as connection:
        attach_lake(connection, project, read_only=True)
        latest = latest_publication(connection)
        states = {state.table.casefold(): state for state in (latest.states if latest else ())}
        columns = {
            name.casefold(): list_columns(connection, f"lake.main.{quote_identifier(name)}")
            for name in list_tables(connection, "lake.main")
        }
    return LakeView(tables={name: LakeTable(columns=found, state=states.get(name)) for name, found in columns.items()})


def plan_load(contract: Table, table: SourceTable, lake: LakeTable | None) -> Load:
    """Return how *table* is loaded, given what the lake has of it.

    Raises:
        ProjectError: its mode needs a key that neither the source nor the project states, or its cursor cannot be one.
        SchemaDrift: its cursor is missing, or ``freeze`` refuses a change of its columns.
    """
    _check_mode(contract, table)
    load = Load(
        mode=contract.mode,
        key=table.key,
        cursor=contract.cursor,
        where=contract.where,
        version=contract.version,
        deletes=contract.deletes,
        base=lake.state if lake else None,
    )
    load = _start_from(load, contract, table)
    drift = find_drift(contract, table, lake)
    refuse_drift(table.name, drift, contract.drift, is_replaced=load.is_replaced)
    return dataclasses.replace(load, drift=drift.notes)


def find_drift(contract: Table, table: SourceTable, lake: LakeTable | None) -> Drift:
    """Return how the columns of *table* differ from those that the lake has; nothing where it has none."""
    staged = {column.name: column.type for column in table.columns}
    return compare_columns(drop_history(lake.columns, lake.state) if lake else staged, staged, contract.drift)


def drop_history(columns: Mapping[str, str], state: TableState | None) -> dict[str, str]:
    """Return *columns* of a table of the lake without those of the history, where *state* says that it has one.

    A source may have columns of the same names and types.
    """
    is_history = state is not None and state.mode == "history"
    return {name: type_ for name, type_ in columns.items() if not (is_history and name in HISTORY)}


def drop_new_columns(contract: Table, table: SourceTable, lake: LakeTable | None) -> SourceTable:
    """Return *table* without the columns that its contract discards."""
    if contract.drift != "discard" or lake is None:
        return table
    new = set(find_drift(contract, table, lake).added)
    return dataclasses.replace(table, columns=tuple(column for column in table.columns if column.name not in new))


def select_new_rows(source: Source, table: SourceTable, load: Load) -> SourceTable:
    """Return *table* with the condition that its cursor is beyond the last one; rows without a cursor count as new."""
    if load.since is None or load.cursor is None:
        return table
    column = table.find_column(load.cursor)
    assert column is not None  # plan_load has looked
    # With a key, rows that are there already do no harm, and the last cursor may have got more rows since.
    operator = ">=" if load.key else ">"
    condition = source.compare_cursor(column, operator, load.since)
    if column.nullable:
        condition = f"{condition} OR {source.compare_cursor(column, 'IS NULL', '')}"
    return dataclasses.replace(table, conditions=(*table.conditions, condition))


def find_mark(connection: duckdb.DuckDBPyConnection, load: Load, table: SourceTable, relation: str) -> str | None:
    """Return the highest finite cursor of *relation* and of the batches before, as DuckDB prints it."""
    column = table.find_column(load.cursor) if load.cursor else None
    if column is None:
        return None
    name = quote_identifier(column.name)
    finite = f" where isfinite({name})" if column.type in _MOMENTS else ""
    before = quote_literal(load.mark) if load.mark else "NULL"
    row = connection.execute(
        f"select cast(greatest(max({name}), cast({before} as {column.type})) as varchar) from {relation}{finite}"
    ).fetchone()
    assert row is not None  # an aggregate has a row
    return None if row[0] is None else str(row[0])


def _check_mode(contract: Table, table: SourceTable) -> None:
    if contract.mode in ("merge", "history") and not table.key:
        raise ProjectError(
            f'Table "{table.name}" has the mode "{contract.mode}" and no key: its rows cannot be told apart.',
            hint=f'State one: [table."{table.name}"] key = ["…"].',
        )
    if contract.mode == "append" and contract.lookback is not None and not table.key:
        raise ProjectError(
            f'Table "{table.name}" looks back and has no key: rows that are there already would be doubled.',
            hint=f'State one: [table."{table.name}"] key = ["…"], or leave out lookback.',
        )
    taken = [column.name for column in table.columns if column.name.casefold() in HISTORY]
    if contract.mode == "history" and taken:
        raise SchemaDrift(
            f'Table "{table.name}" has columns with the names of the history: {", ".join(taken)}.',
            hint=f'Leave them out: [table."{table.name}"] exclude.',
        )
    if contract.cursor is not None:
        _check_cursor(table, contract.cursor)


def _check_cursor(table: SourceTable, cursor: str) -> None:
    column = table.find_column(cursor)
    if column is None:
        raise SchemaDrift(
            f'Table "{table.name}" does not fit its contract: the cursor "{cursor}" is missing.',
            hint=f'Change the source, or [table."{table.name}"] cursor.',
        )
    is_text = column.type == "VARCHAR" and column.note is None
    if not (is_text or column.type in _MOMENTS or _NUMBERS.fullmatch(column.type)):
        shown = f"{column.type}, {column.note}" if column.note else column.type
        raise ProjectError(
            f'Table "{table.name}": the column "{cursor}" ({shown}) has no order to rely on, so it cannot be a cursor.',
            hint="Take an integer, a decimal, a date, a timestamp or a text; a contract may give it such a type.",
        )


def _start_from(load: Load, contract: Table, table: SourceTable) -> Load:
    """Return *load* with where it starts from, and why it reads everything when it does."""
    base = load.base
    if load.mode == "full":
        return load
    if base is None:
        return dataclasses.replace(load, reason="first load in this mode")
    if (base.mode, base.key) != (load.mode, load.key):
        return dataclasses.replace(load, reason="the mode or the key has changed")
    changed = [name for name in ("cursor", "where", "version") if getattr(base, name) != getattr(load, name)]
    if changed:
        # A history is worth keeping: all rows are read, and what differs is added to it.
        reason = f"{' and '.join(changed)} changed"
        return dataclasses.replace(load, reason=reason, is_replaced=load.mode != "history")
    since = _look_back(base.mark, contract, table)
    if since is None and load.mode == "append":
        return dataclasses.replace(load, reason="no cursor was read yet")
    return dataclasses.replace(load, is_replaced=False, since=since, mark=base.mark if since else None)


def _look_back(mark: str | None, contract: Table, table: SourceTable) -> str | None:
    """Return *mark*, in the type that the cursor has now, minus ``lookback``; None where it is no such value."""
    column = table.find_column(contract.cursor) if contract.cursor else None
    if mark is None or column is None:
        return None
    value = f"try_cast({quote_literal(mark)} as {column.type})"
    if contract.lookback is not None:
        value = _subtract(value, contract.lookback, column.type)
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("set timezone = 'UTC'")
        try:
            row = connection.execute(f"select cast({value} as varchar)").fetchone()
        except duckdb.Error as exc:
            raise ProjectError(
                f'Table "{table.name}": lookback {contract.lookback!r} cannot be taken from a {column.type}.',
                hint='Write a number for a numeric cursor, a time such as "2 days" for a date or a timestamp.',
            ) from exc
    return None if row is None or row[0] is None else str(row[0])


def _subtract(value: str, amount: int | Decimal | str, type_: str) -> str:
    if type_ in _MOMENTS:
        return f"cast({value} - interval {quote_literal(str(amount))} as {type_})"
    if not is_integer(type_):
        return f"cast({value} - {amount} as {type_})"
    # No row is below the lowest value of the type, such as 0.
    below = f"coalesce(try_cast({value}::hugeint - {amount} as {type_}), {find_lowest(type_)})"
    return f"case when {value} is not null then {below} end"
