"""Increments: how what was staged of a table that is not replaced changes the lake's table, by its key.

    append     rows whose key is not there yet are added
    merge      rows take the place of those with their key
    history    a changed row closes the one with its key and is added; nothing is ever overwritten

Two rows of one batch with the same key are never chosen between: the audit of the resulting table names them.
Rows that are set aside count as not read, but for the question which rows the source still has.
The same queries give the audits the table as it will be, and the publishing what to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import duckdb

from phasewise.errors import PublishConflict, SchemaDrift
from phasewise.lake.object_store import File
from phasewise.lake.publications import TableState, list_columns
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import read_parquet
from phasewise.project.config import DriftRule, Project
from phasewise.publishing.session import Stage, WarehouseSession
from phasewise.staging.load_plan import Load, drop_history
from phasewise.staging.manifest import Manifest, staged_files, staged_key_files
from phasewise.staging.schema_drift import Drift, compare_columns, holds_all, is_integer, refuse_drift


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What an increment does to the rows of its table."""

    added: int = 0
    changed: int = 0
    removed: int = 0


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """The Parquet files of one table: its rows, and the keys of the source where deleted rows are found by them."""

    rows: tuple[File, ...]
    keys: tuple[File, ...] = ()

    @classmethod
    def staged(cls, project: Project, parts: Sequence[Manifest]) -> TableFiles:
        return cls(
            rows=tuple(file for part in parts for file in staged_files(project, part)),
            keys=tuple(file for part in parts for file in staged_key_files(project, part)),
        )


@dataclass(frozen=True, kw_only=True)
class Increment:
    """What was staged of one table, next to the table of the lake that it changes."""

    table: str
    load: Load
    #: Parquet files with the rows that were read.
    files: tuple[File, ...] = ()
    #: Where these rows are instead: a relation that has ``filename`` and ``file_row_number`` besides their columns.
    source: str | None = None
    #: The rows among them that are set aside: a relation of ``file`` and ``row``. None: none is.
    out: str | None = None
    #: Parquet files with all keys of the source; none where the rows are all rows, or nobody asks for deleted ones.
    key_files: tuple[File, ...] = ()
    #: The moment that the history gives to what changed: when the batch began.
    at: datetime
    drift: Drift
    #: Of the staged files: name → type.
    staged: Mapping[str, str]
    rule: DriftRule
    #: Whether the lake's table has it already.
    is_published: bool = False
    #: The session's table of the keys that it touches, once ``find_touched`` has made it.
    touched: str

    @property
    def lake(self) -> str:
        return f"lake.main.{quote_identifier(self.table)}"

    @property
    def keeps_columns(self) -> bool:
        """Whether a table that is replaced keeps the columns of the one before."""
        return self.rule == "discard" and bool(self.drift.notes)

    @property
    def is_rewritten(self) -> bool:
        """Whether a table that is replaced holds something else than its staged files."""
        return self.load.mode == "history" or self.keeps_columns

    @property
    def is_cast(self) -> bool:
        """Whether the rows get the columns and types of the lake's table; else that gets theirs."""
        return self.keeps_columns or not self.load.is_replaced

    @property
    def read(self) -> str:
        """All rows that were read, as they are staged."""
        return self.source or read_parquet(self.files)

    @property
    def kept(self) -> str:
        """What follows FROM for those that are not set aside; their alias is s."""
        return f"{self.read} as s where not {self.is_out}" if self.out else f"{self.read} as s"

    @property
    def is_out(self) -> str:
        return f"exists (from {self.out} as o where o.file = s.filename and o.row = s.file_row_number)"

    def select_staged(self, *, is_all: bool = False) -> str:
        """Return the rows that were read, with the columns and types that the lake's table will have.

        Those that are set aside are among them with *is_all* only.
        """
        return f"select {select_columns(self.drift.columns, self.staged)} from {self.read if is_all else self.kept}"

    def select_out(self, *expressions: str) -> str:
        """Return the rows that are set aside, and *expressions* over the relation ``out``, whose alias is o."""
        columns = select_columns(self.drift.columns, self.staged, "s") if self.is_cast else "s.*"
        return (
            f"select {', '.join([columns, *expressions])} from {self.read} as s "
            f"join {self.out} as o on o.file = s.filename and o.row = s.file_row_number"
        )

    def select_keys(self) -> str:
        """Return the keys of all rows of the source, with the types that the lake's table will have."""
        names = {name.casefold() for name in self.load.key}
        columns = {name: type_ for name, type_ in self.drift.columns.items() if name.casefold() in names}
        return f"select {select_columns(columns, self.staged)} from {read_parquet(self.key_files)}"

    def select_present(self) -> str:
        """Return the rows of the lake's table, the same way, with those of the history."""
        present = {name: type_ for name, type_ in self.drift.columns.items() if name not in self.drift.added}
        history = ", valid_from, valid_to, is_current" if self.load.mode == "history" else ""
        return f"select {select_columns(self.drift.columns, present)}{history} from {self.lake}"


def name_touched(session: WarehouseSession, table: str) -> str:
    return session.name(f"touched {table}")


def describe_increment(
    session: WarehouseSession, parts: Sequence[Manifest], *, at: datetime, linked: TableFiles | None = None
) -> Increment:
    """Compare what was staged of one table, in *parts* of the batch that began *at*, with the lake.

    Rows and keys are read from the staged files, or from those *linked*.

    Raises:
        SchemaDrift: the lake's table cannot take the columns that were staged, or their values.
        PublishConflict: the lake's table is not the one that the batch began with.
    """
    table, load, rule = parts[0].table, parts[0].load, session.project.find_table(parts[0].table).drift
    is_there = table.casefold() in session.folded
    now = session.states.get(table.casefold()) if is_there else None
    is_published = not load.is_replaced and _is_in_lake(parts[0], now)
    files = linked or TableFiles.staged(session.project, parts)
    staged = session.list_columns(read_parquet(files.rows))
    present = session.list_columns(f"lake.main.{quote_identifier(table)}") if is_there else staged
    drift = compare_columns(drop_history(present, now), staged, rule)
    refuse_drift(table, drift, rule, is_replaced=load.is_replaced)
    increment = Increment(
        table=table,
        load=load,
        files=files.rows,
        key_files=files.keys,
        at=at,
        drift=drift,
        staged=staged,
        rule=rule,
        is_published=is_published,
        touched=name_touched(session, table),
    )
    if increment.is_cast and not is_published:
        _refuse_misfits(session.connection, increment)
    return increment


def select_result(session: WarehouseSession, increment: Increment) -> str:
    """Return the query of the table as it will be; it may read a temporary table of the session."""
    if increment.is_published:
        return f"select * from {increment.lake}"
    if increment.load.is_replaced:
        return select_replacement(increment)
    if increment.load.key:
        find_touched(session.connection, increment)
    return _preview(increment)


def select_pool(increment: Increment) -> str:
    """Return those rows of the table as it will be that were read now, each with its ``FILE`` and ``ROW`` in it.

    Where rows are found by their key the session must have the table of ``find_touched``.
    """
    if increment.is_published:
        return f'select *, \'\' as "{FILE}", 0 as "{ROW}" from {increment.lake} where false'
    columns = select_columns(increment.drift.columns, increment.staged, "s") if increment.is_cast else "s.*"
    history = _begin_history(increment)
    rows = f'select {columns}{history}, s.filename as "{FILE}", s.file_row_number as "{ROW}" from {increment.kept}'
    if increment.load.is_replaced or not increment.load.key:
        return rows
    return f"select * from ({rows}) d where {_is_touched(increment, 'd', _NEW)}"


def find_last(connection: duckdb.DuckDBPyConnection, parts: Sequence[Manifest]) -> str | None:
    """Return the highest cursor that any of *parts* read."""
    column = next((column for column in parts[0].columns if column.name == parts[0].load.cursor), None)
    marks = [part.load.until for part in parts if part.load.until is not None]
    if column is None or not marks:
        return None
    values = ", ".join(f"cast({quote_literal(mark)} as {column.type})" for mark in marks)
    row = connection.execute(f"select cast(list_max([{values}]) as varchar)").fetchone()
    return str(row[0]) if row else None


def select_replacement(increment: Increment) -> str:
    """Return the query of the table that takes the place of the lake's."""
    rows = increment.select_staged() if increment.keeps_columns else f"select s.* from {increment.kept}"
    return f"select *{_begin_history(increment)} from ({rows})"


def find_touched(connection: duckdb.DuckDBPyConnection, increment: Increment) -> None:
    """Make the temporary table of the keys that the increment touches: of rows that are added, changed or gone."""
    keys = _names(increment.load.key)
    columns = _names(increment.drift.columns)
    present = f"({increment.select_present()}{_CURRENT if increment.load.mode == 'history' else ''})"
    found = (
        f"select {_names(increment.load.key, 'd')}, if(l.{_PRESENT} is null, 'added', 'changed') as {_CHANGE} "
        f"from ({increment.select_staged()}) d left join (select true as {_PRESENT}, {columns} from {present}) l "
        f"on {_equal(increment.load.key, 'd', 'l')} "
    )
    if increment.load.mode == "append":
        found += f"where l.{_PRESENT} is null"
    else:
        old, new = _names(increment.drift.columns, "l"), _names(increment.drift.columns, "d")
        found += f"where l.{_PRESENT} is null or row({new}) is distinct from row({old})"
    if increment.load.deletes:
        all_keys = increment.select_keys() if increment.key_files else increment.select_staged(is_all=True)
        found += (
            f" union all select {keys}, 'gone' as {_CHANGE} from {present} l "
            f"where not exists (select 1 from ({all_keys}) k where {_equal(increment.load.key, 'l', 'k')})"
        )
    connection.execute(f"create or replace temp table {increment.touched} as {found}")


def _preview(increment: Increment) -> str:
    columns = _names(increment.drift.columns)
    if not increment.load.key:
        return f"{increment.select_present()} union all {increment.select_staged()}"
    new = f"select {columns} from ({increment.select_staged()}) d where {_is_touched(increment, 'd', _NEW)}"
    if increment.load.mode == "append":
        return f"{increment.select_present()} union all {new}"
    if increment.load.mode == "merge":
        kept = f"from ({increment.select_present()}) l where not {_is_touched(increment, 'l', _OLD)}"
        return f"select {columns} {kept} union all {new}"
    at = _literal(increment.at)
    is_closed = f"is_current and {_is_touched(increment, 'l', _OLD)}"
    closed = f"if({is_closed}, {at}, valid_to) as valid_to, is_current and not ({is_closed}) as is_current"
    return (
        f"select {columns}, valid_from, {closed} from ({increment.select_present()}) l "
        f"union all select {columns}, {at}, null, true from ({new})"
    )


def apply_increment(session: WarehouseSession, increment: Increment) -> Changes:
    """Change the lake's table, in the session's transaction; the files of *increment* may become the lake's.

    Raises:
        PublishConflict: two of the rows have one key, or a row has none.
    """
    session.expect(Stage.CHANGING)
    connection = session.connection
    _refuse_unclear_keys(connection, increment)
    _change_columns(connection, increment)
    changes = _count_changes(connection, increment)
    if changes.changed or changes.removed:
        _retire(connection, increment)
    new = changes.added + changes.changed
    if new and _can_register(increment) and new == fetch_int(connection, f"select count(*) from {increment.read}"):
        register_files(connection, increment.table, increment.files, ", allow_missing => true")
    elif new:
        _insert(connection, increment)
    return changes


def _count_changes(connection: duckdb.DuckDBPyConnection, increment: Increment) -> Changes:
    if not increment.load.key:
        return Changes(added=fetch_int(connection, f"select count(*) from {increment.kept}"))
    find_touched(connection, increment)
    kinds = dict(connection.execute(f"select {_CHANGE}, count(*) from {increment.touched} group by 1").fetchall())
    return Changes(added=kinds.get("added", 0), changed=kinds.get("changed", 0), removed=kinds.get("gone", 0))


def _is_in_lake(part: Manifest, now: TableState | None) -> bool:
    """Tell whether the lake's table has what was staged; raise PublishConflict where it cannot take it either."""
    if now is not None and now.batch == part.batch:
        return True
    if now is None or now != part.load.base:
        began, then = _name_batch(part.load.base), _name_batch(now)
        raise PublishConflict(
            f'Table "{part.table}" was staged on top of {began}, but the warehouse has {then} of it.',
            hint="Start a new batch.",
        )
    return False


def _name_batch(state: TableState | None) -> str:
    return f'batch "{state.batch}"' if state else "no batch"


_CURRENT = " where is_current"
#: Columns of our own besides those of the table; no source has columns of these names.
_PRESENT, _CHANGE = "_phasewise_present", "_phasewise_change"
FILE, ROW = "_phasewise_file", "_phasewise_row"
_OLD, _NEW = ("changed", "gone"), ("added", "changed")
_NO_TIME = "cast(null as timestamp with time zone)"


def _names(columns: Iterable[str], alias: str = "") -> str:
    prefix = f"{alias}." if alias else ""
    return ", ".join(f"{prefix}{quote_identifier(column)}" for column in columns)


def select_columns(columns: Mapping[str, str], present: Mapping[str, str], alias: str = "") -> str:
    """Return *columns*, name → type, of a relation that has those *present*; NULL for others."""
    types = {name.casefold(): type_ for name, type_ in present.items()}
    return ", ".join(
        f"{_cast_column(name, type_, types.get(name.casefold()), alias)} as {quote_identifier(name)}"
        for name, type_ in columns.items()
    )


def _cast_column(name: str, type_: str, present: str | None, alias: str) -> str:
    value = _names([name], alias)
    if present is None:
        return f"cast(null as {type_})"
    if holds_all(type_, present):
        return f"cast({value} as {type_})"
    # A cast rounds without a word. describe_increment has refused such values; the query must not rely on it.
    # The value is part of the message only so that it is not evaluated beforehand.
    failure = f"error({quote_literal(f'column {name} does not fit: ')} || {value})"
    return f"case when {_is_misfit(value, type_, present)} then {failure} else try_cast({value} as {type_}) end"


def _is_misfit(value: str, type_: str, present: str) -> str:
    return f"try_cast(try_cast({value} as {type_}) as {present}) is distinct from {value}"


def _refuse_misfits(connection: duckdb.DuckDBPyConnection, increment: Increment) -> None:
    """Refuse values that are not in the type that the lake's table keeps for their column."""
    staged = {name.casefold(): type_ for name, type_ in increment.staged.items()}
    for name, type_ in increment.drift.columns.items():
        present = staged.get(name.casefold())
        if present is None or holds_all(type_, present):
            continue
        value = quote_identifier(name)
        row = connection.execute(
            f"select cast({value} as varchar) from {increment.read} where {_is_misfit(value, type_, present)} limit 1"
        ).fetchone()
        if row is not None:
            raise SchemaDrift(
                f'Table "{increment.table}": column {name} is {type_} in the warehouse, which does not hold {row[0]}.',
                hint=f'Take the wider type: [table."{increment.table}"] drift = "evolve".',
            )


def _equal(key: Iterable[str], left: str, right: str) -> str:
    return " and ".join(f"{left}.{quote_identifier(name)} = {right}.{quote_identifier(name)}" for name in key)


def _literal(at: datetime) -> str:
    return f"cast({quote_literal(at.isoformat())} as timestamp with time zone)"


def is_same(columns: Iterable[str], left: str, right: str) -> str:
    """Return the condition that two relations agree in *columns*; two NULLs do."""
    return " and ".join(
        f"{left}.{quote_identifier(name)} is not distinct from {right}.{quote_identifier(name)}" for name in columns
    )


def _begin_history(increment: Increment) -> str:
    """Return the columns of a history, a comma before them, for a row that begins now; empty in any other mode."""
    columns = f", {_literal(increment.at)} as valid_from, {_NO_TIME} as valid_to, true as is_current"
    return columns if increment.load.mode == "history" else ""


def _is_touched(increment: Increment, alias: str, kinds: Iterable[str]) -> str:
    shown = ", ".join(quote_literal(kind) for kind in kinds)
    # A row without a key must be seen by the audit of the key.
    where = f"{is_same(increment.load.key, 't', alias)} and t.{_CHANGE} in ({shown})"
    return f"exists (select 1 from {increment.touched} t where {where})"


def _refuse_unclear_keys(connection: duckdb.DuckDBPyConnection, increment: Increment) -> None:
    if not increment.load.key:
        return
    keys = _names(increment.load.key)
    is_null = " or ".join(f"{quote_identifier(name)} is null" for name in increment.load.key)
    row = connection.execute(
        f"select {keys} from {increment.kept} group by {keys} having count(*) > 1 or {is_null} limit 1"
    ).fetchone()
    if row is not None:
        shown = ", ".join(f"{name} = {value}" for name, value in zip(increment.load.key, row, strict=True))
        raise PublishConflict(
            f'Table "{increment.table}" has rows with the same key, or without one: {shown}.',
            hint="Fix the source, or state another key, and start a new batch.",
        )


def _change_columns(connection: duckdb.DuckDBPyConnection, increment: Increment) -> None:
    """Give the lake's table its new columns, and the wider types of those that it has."""
    before = drop_history(list_columns(connection, increment.lake), increment.load.base)
    wider = [name for name, type_ in before.items() if increment.drift.columns[name] != type_]
    if any(not _can_promote(before[name], increment.drift.columns[name]) for name in wider):
        # DuckLake promotes integers and floats, and leaves other types as they are: the table is written again.
        connection.execute(f"create or replace table {increment.lake} as {increment.select_present()}")
        return
    for name in wider:
        new = increment.drift.columns[name]
        connection.execute(f"alter table {increment.lake} alter {quote_identifier(name)} set data type {new}")
    for name, new in increment.drift.columns.items():
        if name not in before:
            connection.execute(f"alter table {increment.lake} add column {quote_identifier(name)} {new}")


def _can_promote(old: str, new: str) -> bool:
    return (is_integer(old) and is_integer(new)) or (old, new) == ("FLOAT", "DOUBLE")


def _can_register(increment: Increment) -> bool:
    """Tell whether the files hold exactly what the table takes of them.

    Rows that are set aside could be deleted from them again, for which DuckLake would look through the whole table.
    """
    if increment.source or increment.out or increment.load.mode == "history":
        return False
    wanted = {name.casefold(): type_ for name, type_ in increment.drift.columns.items()}
    return all(wanted.get(name.casefold()) == type_ for name, type_ in increment.staged.items())


def register_files(connection: duckdb.DuckDBPyConnection, table: str, files: Iterable[File], more: str = "") -> None:
    """Make *files* part of *table* of the lake, as they are; *more* are further arguments of DuckLake's function."""
    paths = ", ".join(quote_literal(str(file)) for file in files)
    connection.execute(
        f"call ducklake_add_data_files('lake', {quote_literal(table)}, [{paths}], "
        f"schema => 'main', hive_partitioning => false{more})"
    )


def _retire(connection: duckdb.DuckDBPyConnection, increment: Increment) -> None:
    """Remove, or in a history close, the rows that others replace or that are gone."""
    old = _is_touched(increment, "l", _OLD)
    if increment.load.mode == "merge":
        connection.execute(f"delete from {increment.lake} as l where {old}")
    else:
        at = _literal(increment.at)
        connection.execute(
            f"update {increment.lake} as l set valid_to = {at}, is_current = false where is_current and {old}"
        )


def _insert(connection: duckdb.DuckDBPyConnection, increment: Increment) -> None:
    where = f" where {_is_touched(increment, 'd', _NEW)}" if increment.load.key else ""
    rows = f"select d.*{_begin_history(increment)} from ({increment.select_staged()}) d{where}"
    connection.execute(f"insert into {increment.lake} by name {rows}")
