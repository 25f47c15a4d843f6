"""Queries of users: exactly one SELECT, and rows that JSON can hold."""

from __future__ import annotations

import datetime as dt
import json
import math
import uuid
from decimal import Decimal

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewise.errors import ProjectError
from phasewise.lake.queries import TableName, check_select, fetch_rows, list_tables_read, strip_select, to_json


@pytest.mark.parametrize("sql", ["select 1", "from t;", "with a as (select 1) from a", "values (1)", "(select 1)"])
def test_every_way_to_write_a_select_is_accepted(sql: str):
    check_select(sql, where="x")


def test_a_pivot_without_its_list_is_refused_with_the_way_out():
    with pytest.raises(ProjectError, match="PIVOT with its IN list"):
        check_select("pivot t on x using sum(y)", where="x")


@pytest.mark.parametrize("sql", ["select ';' as x -- a; b\n;\n -- end", "select ';' as x", "select 'ä;ö' as x;;"])
def test_a_stripped_select_stands_in_parentheses(sql: str):
    with duckdb.connect() as connection:
        expected = connection.execute(sql).fetchall()

        assert connection.execute(f"from (\n{strip_select(sql)}\n)").fetchall() == expected


def test_tables_are_told_from_what_a_with_defines():
    sql = "with a as (from b) select * from a, marts.a, lake.main.c where exists (with d as (from e) from d)"
    with duckdb.connect() as connection:
        found = list_tables_read(connection, sql)

    assert {(table.schema, table.name) for table in found} == {("", "b"), ("marts", "a"), ("main", "c"), ("", "e")}
    assert TableName(schema="", name="b") in found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (Decimal("1.50"), 1.5),
        (Decimal("12345678901234567890"), 12345678901234567890),
        (Decimal("0.1234567890123456789"), "0.1234567890123456789"),
        (dt.date(1871, 5, 4), "1871-05-04"),
        (dt.timedelta(days=1), "1 day, 0:00:00"),
        (b"\xff", "/w=="),
        ([1, {"a": Decimal(2)}], [1, {"a": 2}]),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_values_become_what_json_holds(value: object, expected: object):
    assert to_json(value) == expected


@given(st.decimals(allow_nan=True, allow_infinity=True))
def test_a_decimal_never_changes_its_value(value: Decimal):
    encoded = to_json(value)

    json.dumps(encoded, allow_nan=False)
    assert Decimal(str(encoded)).compare_total(value) == 0 or Decimal(str(encoded)) == value


def test_rows_keep_columns_of_the_same_name():
    with duckdb.connect() as connection:
        rows = fetch_rows(connection, "select 1 as a, 2 as a", limit=5)

    assert (rows.columns, rows.rows) == (("a", "a"), ((1, 2),))
