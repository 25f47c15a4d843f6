"""Ranges: conditions that divide the rows of a table, so that each row fulfils exactly one of them.

Where a range ends is taken from the rows themselves, by the database that compares with it later: whatever its order
of texts is, both sides of a bound agree on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from phasewise.sources.protocol import Column, SourceTable

#: A table is never split into more partitions than this; each of them is a flow run.
MAX_PARTITIONS = 256
#: Stretches of values per partition whose rows are counted to find bounds of a column that has values more than once.
_STRETCHES = 32
#: Types of cursors whose order source and lake agree on, and whose values a literal names exactly.
_RANGED = re.compile(r"U?(?:TINYINT|SMALLINT|INTEGER|BIGINT)|DECIMAL\(\d+,\d+\)|DATE|TIMESTAMP(?: WITH TIME ZONE)?")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a source is asked for the values that divide a table."""

    quote: Callable[[str], str]
    #: Expression → an expression that prints its value.
    show: Callable[[str], str]
    #: Column and what was printed of a value of it → its literal.
    literal: Callable[[Column, str], str]
    #: Query → its rows.
    fetch: Callable[[str], list[Any]]


def divide_by_values(dialect: Dialect, table: SourceTable, relation: str, *, rows: int, limit: int) -> list[str]:
    """Return the conditions for ranges of the key of *table*, else of its cursor; none where it has neither.

    *relation* is the table with its conditions, in which there are *rows* rows.
    """
    columns = find_range_columns(table)
    if not columns or rows <= limit:
        return []
    names = [dialect.quote(column.name) for column in columns]
    if table.key:
        query = query_bounds(names, [dialect.show(name) for name in names], relation, rows=rows, limit=limit)
        bounds = [bound for bound in dialect.fetch(query) if None not in bound]
    else:
        query = query_stretches(names[0], dialect.show, relation, rows=rows, limit=limit)
        bounds = [[bound] for bound in find_value_bounds(dialect.fetch(query), rows=rows, limit=limit)]
    literals = [[dialect.literal(*value) for value in zip(columns, bound, strict=True)] for bound in bounds]
    return divide(names, literals, is_nullable=len(columns) == 1 and columns[0].nullable)


def count_partitions(rows: int, limit: int) -> int:
    """Return into how many partitions of at most *limit* rows a table of *rows* rows is split; 1: it is not."""
    return max(1, min(MAX_PARTITIONS, -(-rows // limit)))


def find_bounds(blocks: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """Return the starts of all partitions but the first, so that all have about as many rows, at most about *limit*.

    *blocks* are the start and the rows of each stretch of the table, in order: a bound is the start of one of them.
    """
    total = sum(rows for _, rows in blocks)
    parts = count_partitions(total, limit)
    bounds: list[int] = []
    read, last = 0, 0
    for start, rows in blocks:
        # The middle of a block says which partition it is of.
        part = min(int((read + rows / 2) * parts / total), parts - 1) if total else 0
        if part > last and read:
            bounds.append(start)
        read, last = read + rows, max(part, last)
    return bounds


def divide(columns: Sequence[str], bounds: Sequence[Sequence[str]], *, is_nullable: bool = False) -> list[str]:
    """Return the conditions for the ranges between *bounds*: tuples of SQL literals in the order of *columns*.

    Rows are compared by the first column, those equal in it by the second, and so on. NULLs are in the first range
    where the one column *is_nullable*; several columns must have none. Without bounds there is nothing to divide.
    """
    distinct = [tuple(bound) for bound in dict.fromkeys(map(tuple, bounds))]
    conditions = []
    for low, high in pairwise([None, *distinct, None]):
        before = _compare(columns, high, "<") if high else ""
        if before and not low and is_nullable:
            before = f"({before} OR {columns[0]} IS NULL)"
        after = _compare(columns, low, ">") if low else ""
        conditions.append(" AND ".join(filter(None, (after, before))))
    return conditions if distinct else []


def query_bounds(columns: Sequence[str], printed: Sequence[str], relation: str, *, rows: int, limit: int) -> str:
    """Return the query for the bounds of ranges of equal length over *columns*.

    *printed* are expressions for their values as they come back, *relation* the table with its conditions, in which
    there are *rows* rows.
    """
    step = -(-rows // count_partitions(rows, limit))
    order = ", ".join(columns)
    # Names that no table has: in the window's order MariaDB takes a column for an alias of the same name.
    names = [f"phasewise_k{index}" for index in range(len(printed))]
    shown = ", ".join(f"{text} AS {name}" for text, name in zip(printed, names, strict=True))
    numbered = f"SELECT {shown}, row_number() OVER (ORDER BY {order}) AS phasewise_n FROM {relation}"
    return (
        f"SELECT {', '.join(names)} FROM ({numbered}) AS numbered "
        f"WHERE phasewise_n > 1 AND (phasewise_n - 1) % {step} = 0 ORDER BY phasewise_n"
    )


def query_stretches(column: str, show: Callable[[str], str], relation: str, *, rows: int, limit: int) -> str:
    """Return the query for stretches of *column*, of about equal rows: the lowest value of each, and its rows.

    All rows of one value are in one stretch, and NULLs in none.
    """
    stretches = count_partitions(rows, limit) * _STRETCHES
    counted = f"SELECT {column} AS phasewise_v, count(*) AS phasewise_n FROM {relation} GROUP BY {column}"
    before = "sum(phasewise_n) OVER (ORDER BY phasewise_v) - phasewise_n"
    numbered = (
        f"SELECT phasewise_v, phasewise_n, floor(({before}) * {stretches} / {rows}) AS phasewise_s "
        f"FROM ({counted}) AS counted WHERE phasewise_v IS NOT NULL"
    )
    return (
        f"SELECT {show('min(phasewise_v)')} AS phasewise_low, sum(phasewise_n) AS phasewise_rows "
        f"FROM ({numbered}) AS numbered GROUP BY phasewise_s ORDER BY phasewise_s"
    )


def find_value_bounds(stretches: Sequence[tuple[str, Any]], *, rows: int, limit: int) -> list[str]:
    """Return the lowest values of all partitions but the first, which has the NULLs, from those of *stretches*."""
    counts = [int(count) for _, count in stretches]
    blocks = list(enumerate([rows - sum(counts), *counts]))
    return [stretches[number - 1][0] for number in find_bounds(blocks, limit)]


def find_range_columns(table: SourceTable) -> tuple[Column, ...]:
    """Return the columns of the key by which *table* is divided: those of its beginning that have no NULLs.

    A key whose first column may be NULL gives that one alone. Without a key it is the cursor, if that is a number or a
    moment.
    """
    found: list[Column] = []
    for name in table.key or (table.cursor,):
        column = table.find_column(name) if name else None
        if column is None or not (table.key or _RANGED.fullmatch(column.type)):
            break
        if column.nullable:
            return tuple(found) or (column,)
        found.append(column)
    return tuple(found)


def _compare(columns: Sequence[str], values: Sequence[str], sign: str) -> str:
    """Return the condition for the rows below *values* (``<``), or at and above them (``>``)."""
    column, value = columns[0], values[0]
    if len(columns) == 1:
        return f"{column} {sign}{'=' if sign == '>' else ''} {value}"
    # An index finds the first comparison; the rest is for the rows that are equal in it.
    rest = _compare(columns[1:], values[1:], sign)
    return f"{column} {sign}= {value} AND ({column} {sign} {value} OR ({rest}))"
