"""Ranges: conditions that divide the rows of a table, so that each row fulfils exactly one of them.

Where a range ends is taken from the rows themselves, by the database that compares with it later: whatever its order
of texts is, both sides of a bound agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from phasewise.sources import SourceTable

#: A table is never split into more partitions than this; each of them is a flow run.
MAX_PARTITIONS = 256


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


def find_range_columns(table: SourceTable) -> tuple[str, ...]:
    """Return the columns of the key by which *table* is divided: those of its beginning that have no NULLs.

    A key whose first column may be NULL gives that one alone; no key gives none.
    """
    names: list[str] = []
    for name in table.key:
        column = table.find_column(name)
        if column is None or column.nullable:
            break
        names.append(name)
    return tuple(names) or table.key[:1]


def is_range_nullable(table: SourceTable, columns: Sequence[str]) -> bool:
    """Tell whether the one column of *columns* may have NULLs."""
    column = table.find_column(columns[0]) if len(columns) == 1 else None
    return column is not None and column.nullable


def _compare(columns: Sequence[str], values: Sequence[str], sign: str) -> str:
    """Return the condition for the rows below *values* (``<``), or at and above them (``>``)."""
    column, value = columns[0], values[0]
    if len(columns) == 1:
        return f"{column} {sign}{'=' if sign == '>' else ''} {value}"
    # An index finds the first comparison; the rest is for the rows that are equal in it.
    rest = _compare(columns[1:], values[1:], sign)
    return f"{column} {sign}= {value} AND ({column} {sign} {value} OR ({rest}))"
