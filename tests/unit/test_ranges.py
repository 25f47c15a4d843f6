"""Ranges: every row is in exactly one of them, and they are alike in size."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewise.sources import Column, SourceTable
from phasewise.sources.ranges import MAX_PARTITIONS, count_partitions, divide, find_bounds, find_range_columns


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

    assert find_range_columns(SourceTable(name="t", columns=columns, key=("c", "a", "b"))) == ("c", "a")
    assert find_range_columns(SourceTable(name="t", columns=columns, key=("b", "a"))) == ("b",)
    assert find_range_columns(SourceTable(name="t", columns=columns)) == ()
