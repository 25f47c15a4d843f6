"""SELECTs that users write (audits, marts): checked to be one SELECT, run, their rows made fit for JSON."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import TypeAlias

import duckdb

from phasewise.errors import ProjectError

#: What ``json.dumps`` takes without a default and without NaN.
JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The first rows of a query: one tuple per row, in the order of *columns*."""

    columns: tuple[str, ...]
    rows: tuple[tuple[JsonValue, ...], ...]

    def as_records(self) -> tuple[dict[str, JsonValue], ...]:
        return tuple(dict(zip(self.columns, row, strict=True)) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class TableName:
    """A table as a query spells it."""

    #: Empty where the query names none.
    schema: str
    name: str


def check_select(sql: str, *, where: str) -> None:
    """Refuse *sql* unless it is exactly one SELECT.

    Raises:
        ProjectError: it does not parse, is empty, is several statements, or does something else than select.
            The message begins with *where*, such as ``marts/payroll.sql``.
    """
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as exc:
        raise ProjectError(f"{where} is not valid SQL: {first_line(exc)}") from exc
    if len(statements) != 1:
        raise ProjectError(
            f"{where} must be one SELECT; it has {len(statements)} statements.",
            hint="Write a PIVOT with its IN list: without one it counts as two." if len(statements) > 1 else None,
        )
    if statements[0].type != duckdb.StatementType.SELECT:
        raise ProjectError(f"{where} must be one SELECT; it is {statements[0].type.name}.")


def strip_select(sql: str) -> str:
    """Return *sql* without its last semicolon and what follows, so that it can stand in parentheses."""
    # Offsets of the tokenizer count bytes of UTF-8.
    text = sql.encode()
    for offset, _ in reversed(duckdb.tokenize(sql)):
        if text[offset : offset + 1] != b";":
            break
        text = text[:offset]
    return text.decode()


def list_tables_read(connection: duckdb.DuckDBPyConnection, sql: str) -> frozenset[TableName]:
    """Return the tables and views that *sql*, one SELECT, reads; what its WITH defines is not among them."""
    row = connection.execute("select json_serialize_sql(?)", [sql]).fetchone()
    assert row is not None, "a select without FROM returns one row"
    return frozenset(_walk(json.loads(row[0]), hidden=frozenset()))


def find_missing_tables(connection: duckdb.DuckDBPyConnection, sql: str, present: Collection[str]) -> list[str]:
    """Return the tables that *sql* reads by a bare name and that are not *present*; none when it does not parse."""
    try:
        read = list_tables_read(connection, sql)
    except duckdb.Error:
        return []
    known = {name.casefold() for name in present}
    return sorted(table.name for table in read if not table.schema and table.name.casefold() not in known)


def _walk(node: object, *, hidden: frozenset[str]) -> Iterator[TableName]:
    """Yield the tables below *node* of a parsed query; *hidden* are the names that an outer WITH defines."""
    if isinstance(node, list):
        for item in node:
            yield from _walk(item, hidden=hidden)
    elif isinstance(node, dict):
        defined = node.get("cte_map") or {"map": []}
        hidden |= {str(entry["key"]).casefold() for entry in defined["map"]}
        if node.get("type") == "BASE_TABLE":
            name = TableName(schema=node["schema_name"], name=node["table_name"])
            if name.schema or name.name.casefold() not in hidden:
                yield name
        for item in node.values():
            yield from _walk(item, hidden=hidden)


def fetch_rows(connection: duckdb.DuckDBPyConnection, sql: str, *, limit: int) -> Rows:
    """Run *sql* and return its first *limit* rows."""
    cursor = connection.execute(sql)
    columns = tuple(str(column[0]) for column in cursor.description or ())
    rows = tuple(tuple(to_json(value) for value in row) for row in cursor.fetchmany(limit))
    return Rows(columns=columns, rows=rows)


def fetch_int(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    """Run *sql*, which returns one row whose first column is a number, and return that number; NULL counts as 0."""
    row = connection.execute(sql).fetchone()
    assert row is not None, "an aggregate without GROUP BY returns one row"
    return int(row[0] or 0)


def to_json(value: object) -> JsonValue:
    """Return *value* as JSON can hold it; what has no number or text of its own becomes the text of it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return _decimal_to_json(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode("ascii")
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [to_json(item) for item in value]
    return str(value)


def first_line(exc: BaseException) -> str:
    """Return the first line of DuckDB's message: the lines after it repeat the query."""
    return str(exc).strip().split("\n", 1)[0]


def _decimal_to_json(value: Decimal) -> JsonValue:
    if not value.is_finite():
        return str(value)
    if value == value.to_integral_value():
        return int(value)
    # A number where the nearest double prints as the same decimal, else its exact text.
    return float(value) if Decimal(repr(float(value))) == value else str(value)
