"""Marts: built in the order in which they need one another, faithful to the last digit, one clear error each."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from phasewise.errors import ProjectError
from phasewise.lake.marts import build_marts, order_marts, read_mart
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Mart, Project
from phasewise.testing.projects import SAMPLE_SETTINGS, write_project


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def connection(tmp_path: Path):
    project = write_project(tmp_path, source="create table t (a integer)")
    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project)
        yield connection


def project_with(**marts: str) -> Project:
    """A project that has only marts: what ``build_marts`` looks at."""
    return Project.model_construct(marts=tuple(mart(name, sql) for name, sql in marts.items()))


def mart(name: str, sql: str, **header: str) -> Mart:
    return Mart.model_validate({"name": name, "sql": sql, **header})


def names(marts: list[Mart]) -> list[str]:
    return [mart.name for mart in marts]


def test_a_mart_comes_after_those_that_it_reads():
    marts = [mart("a", "from b"), mart("b", "select * from (select * from marts.c)"), mart("c", "select 1 as x")]

    assert names(order_marts(marts)) == ["c", "b", "a"]


def test_marts_are_found_wherever_a_query_reads_them():
    reads = "select (select max(x) from c) as y from t join d using (x) where exists (with e as (from b) from e)"
    marts = [mart("a", reads), mart("b", "from t"), mart("c", "from t"), mart("d", "from t")]

    assert names(order_marts(marts))[-1] == "a"


def test_the_name_of_a_common_table_expression_is_no_mart():
    marts = [mart("a", "with b as (select 1 as x) from b"), mart("b", "from a")]

    assert names(order_marts(marts)) == ["a", "b"]


def test_a_mart_may_have_the_name_of_the_table_that_it_reads():
    assert names(order_marts([mart("people", "select count(*) as n from people")])) == ["people"]


def test_a_table_of_main_is_no_mart():
    assert names(order_marts([mart("a", "from main.b"), mart("b", "from a")])) == ["a", "b"]


def test_marts_that_need_one_another_are_refused():
    with pytest.raises(ProjectError, match="circle: .*→") as caught:
        order_marts([mart("a", "from b"), mart("b", "from c"), mart("c", "from a")])

    assert all(name in caught.value.message for name in "abc")


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("select 1; select 2", "has 2 statements"),
        ("-- nothing", "has 0 statements"),
        ("drop table t", "it is DROP"),
        ("selec 1", "not valid SQL: Parser Error"),
    ],
)
def test_what_is_not_one_select_is_refused(sql: str, problem: str):
    with pytest.raises(ProjectError, match=rf"marts/a\.sql .*{problem}"):
        order_marts([mart("a", sql)])


def test_marts_are_tables_of_their_schema(connection: duckdb.DuckDBPyConnection):
    connection.execute("create table lake.main.t as select range as x from range(5)")
    project = project_with(doubled="select 2 * x as y from base -- twice\n;\n-- end", base="select x from t order by x")

    build_marts(connection, order_marts(project.marts))

    assert connection.execute("from lake.marts.doubled").fetchall() == [(0,), (2,), (4,), (6,), (8,)]


def test_a_mart_that_was_removed_from_the_project_goes(connection: duckdb.DuckDBPyConnection):
    build_marts(connection, order_marts(project_with(a="select 1 as x", b="select 2 as x").marts))
    build_marts(connection, order_marts(project_with(b="select 3 as x").marts))

    tables = connection.execute("select table_name from duckdb_tables() where schema_name = 'marts'").fetchall()
    assert tables == [("b",)]


def test_large_sums_keep_every_digit(connection: duckdb.DuckDBPyConnection):
    # 2^53 + 1 is the first integer that no double holds; sum() of BIGINT is a HUGEINT, which Parquet cannot store.
    connection.execute("create table lake.main.t as select 9007199254740993 as x from range(100)")
    project = project_with(total="select sum(x) as total, max(x) as y from t group by x -- one row\n;")

    build_marts(connection, order_marts(project.marts))

    assert connection.execute("from lake.marts.total").fetchall() == [(Decimal(900719925474099300), 9007199254740993)]


def test_rows_come_back_in_the_order_of_the_select(connection: duckdb.DuckDBPyConnection):
    project = project_with(sorted="select x from range(2000) as t(x) order by -x % 7, hash(x)")
    build_marts(connection, order_marts(project.marts))

    data = read_mart(connection, project.marts[0], limit=50)

    expected = connection.execute(project.marts[0].sql).fetchmany(50)
    assert list(data.rows) == expected
    assert data.total_rows == 2000


def test_a_mart_that_fails_names_its_file(connection: duckdb.DuckDBPyConnection):
    with pytest.raises(ProjectError, match=r"^marts/broken\.sql failed: Catalog Error: .*nowhere"):
        build_marts(connection, order_marts(project_with(broken="from nowhere").marts))


def test_a_header_that_names_no_column_is_refused(connection: duckdb.DuckDBPyConnection):
    project = Project.model_construct(marts=(mart("a", "select 1 as x, 2 as y", x="player"),))
    build_marts(connection, order_marts(project.marts))

    with pytest.raises(ProjectError, match=r'"x: player" names no column of the mart\. It has: x, y\.'):
        read_mart(connection, project.marts[0])


def test_a_mart_that_was_never_built_says_what_to_do(connection: duckdb.DuckDBPyConnection):
    with pytest.raises(ProjectError, match="is not in the warehouse"):
        read_mart(connection, mart("a", "select 1 as x"))
