"""Ranges: every row is in exactly one of them, and they are alike in size."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phasewise.sources import Column, SourceTable
from phasewise.sources.ranges import (
    MAX_PARTITIONS,
    Dialect,
    count_partitions,
    divide,
    divide_by_values,
    find_bounds,
    find_range_columns,
    find_value_bounds,
)


def column(name: str, *, nullable: bool = False) -> Column:
    return Column(name=name, source_type="TEXT", type="VARCHAR", nullable=nullable)


def count_matches(rows: Sequence[tuple[object, ...]], conditions: Sequence[str]) -> list[int]:
    """Return for each of *rows*, of the columns a and b, how many conditions hold for it."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (a TEXT COLLATE NOCASE, b INTEGER)")
        database.executemany("INSERT INTO t VALUES (?, ?)", rows)
        matches = " + ".join(f"coalesce(({condition}), 0)" for condition in conditions)
        return [row[0] for row in database.execute(f"SELECT {matches} FROM t")]


def quote(value: object) -> str:
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


ROWS = st.lists(st.tuples(st.text(alphabet="aAbB'é", max_size=3), st.integers(-3, 3)), min_size=2, max_size=30)


@given(rows=ROWS, data=st.data())
def test_every_row_is_in_exactly_one_range_of_a_key_of_two_columns(rows, data):
    chosen = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=5))
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (a TEXT COLLATE NOCASE, b INTEGER)")
        database.executemany("INSERT INTO t VALUES (?, ?)", chosen)
        bounds = database.execute("SELECT a, b FROM t ORDER BY a, b").fetchall()

    conditions = divide(["a", "b"], [[quote(value) for value in bound] for bound in bounds])

    assert count_matches(rows, conditions) == [1] * len(rows)


@given(rows=st.lists(st.tuples(st.none() | st.integers(-5, 5)), min_size=1), bounds=st.sets(st.integers(-5, 5)))
def test_rows_without_a_value_are_in_the_first_range(rows, bounds):
    conditions = divide(["b"], [[str(bound)] for bound in sorted(bounds)], is_nullable=True) or ["1"]

    assert count_matches([(None, *row) for row in rows], conditions) == [1] * len(rows)
    assert count_matches([(None, None)], conditions[:1]) == [1]


def test_without_bounds_there_is_nothing_to_divide():
    assert divide(["a"], []) == []


@given(weights=st.lists(st.integers(0, 40), min_size=200, max_size=400), parts=st.integers(2, 8))
def test_stretches_of_any_length_are_divided_evenly(weights, parts):
    total = sum(weights)
    if total < 2000:
        return  # one stretch could be a whole partition
    blocks = list(enumerate(weights))

    bounds = find_bounds(blocks, -(-total // parts))

    sizes = [sum(weights[low:high]) for low, high in zip([0, *bounds], [*bounds, len(weights)], strict=True)]
    assert len(sizes) == parts
    assert max(sizes) <= 2 * min(sizes)
    assert sum(sizes) == total


def test_empty_stretches_at_either_end_are_no_partition():
    assert find_bounds([(0, 0), (1, 10), (2, 10), (3, 0), (4, 0)], 10) == [2]


def test_a_table_no_larger_than_the_limit_is_not_divided():
    assert find_bounds([(0, 500), (1, 500)], 1000) == []
    assert find_bounds([], 10) == []


@pytest.mark.parametrize(("rows", "limit", "count"), [(0, 5, 1), (5, 5, 1), (6, 5, 2), (10**9, 1, MAX_PARTITIONS)])
def test_as_many_partitions_as_are_needed_up_to_a_bound(rows: int, limit: int, count: int):
    assert count_partitions(rows, limit) == count


def test_a_key_is_used_as_far_as_it_has_no_nulls():
    columns = (column("a"), column("b", nullable=True), column("c"))

    assert find_range_columns(SourceTable(name="t", columns=columns, key=("c", "a", "b"))) == (columns[2], columns[0])
    assert find_range_columns(SourceTable(name="t", columns=columns, key=("b", "a"))) == (columns[1],)
    assert find_range_columns(SourceTable(name="t", columns=columns)) == ()


def test_without_a_key_the_cursor_is_used_where_it_is_a_number_or_a_moment():
    types = ("BIGINT", "DECIMAL(38,10)", "DATE", "TIMESTAMP WITH TIME ZONE", "VARCHAR", "DOUBLE")
    columns = tuple(Column(name=type_, source_type="x", type=type_, nullable=True) for type_ in types)
    tables = [SourceTable(name="t", columns=columns, cursor=type_) for type_ in types]

    assert [bool(find_range_columns(table)) for table in tables] == [True] * 4 + [False] * 2
    assert find_range_columns(SourceTable(name="t", columns=columns, cursor="DATE", key=("BIGINT",))) == (columns[0],)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=40, max_size=120), nulls=st.integers(0, 200), parts=st.integers(2, 5)
)
def test_values_that_many_rows_share_are_divided_evenly(counts: list[int], nulls: int, parts: int):
    # Values of skewed distances, each as often as *counts* says.
    rows: list[tuple[object, ...]] = [(None, n**4) for n, count in enumerate(counts) for _ in range(count)]
    rows += [(None, None)] * nulls
    limit = -(-len(rows) // parts)
    assume(4 * max(*counts, nulls) < limit)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (a TEXT, b INTEGER)")
        database.executemany("INSERT INTO t VALUES (?, ?)", rows)
        dialect = Dialect(
            quote=lambda name: name,
            show=lambda value: f"quote({value})",
            literal=lambda _, printed: printed,
            fetch=lambda query: database.execute(query).fetchall(),
        )
        columns = (Column(name="b", source_type="INTEGER", type="BIGINT", nullable=True),)
        table = SourceTable(name="t", columns=columns, cursor="b")

        conditions = divide_by_values(dialect, table, "t", rows=len(rows), limit=limit)

        sizes = [database.execute(f"SELECT count(*) FROM t WHERE {one}").fetchone()[0] for one in conditions]
    assert count_matches(rows, conditions) == [1] * len(rows)
    assert len(sizes) == count_partitions(len(rows), limit)
    assert max(sizes) <= 2 * min(sizes)


def test_rows_without_a_value_are_a_partition_of_their_own_when_they_are_many():
    bounds = find_value_bounds([("'1'", 10), ("'2'", 10)], rows=40, limit=20)

    assert bounds == ["'1'"]
