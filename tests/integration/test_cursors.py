"""Cursors are compared as the lake would, whatever a server's collation and time zone are, and what a file knows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import duckdb
import pytest

from phasewise.lake.publications import open_reader
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.testing.projects import SAMPLE_SETTINGS as SETTINGS
from phasewise.testing.projects import publish_sample, stage_batch
from tests.servers import find_mariadb, find_postgres, mariadb, psql
from tests.staged import read_manifest

Case = tuple[str, list[str], list[str]]
#: Type, the values of the first batch (the second is the last), those that come later, which of these are new: the
#: first of them has a value below the last one.
CASES: Mapping[str, Case] = {
    "bigint": ("bigint", ["-5", "9007199254740993"], ["9007199254740992", "9007199254740994"]),
    "decimal": ("decimal(20,4)", ["-1.5", "10.2501"], ["10.2500", "10.2502"]),
    "date": ("date", ["'2024-02-28'", "'2024-02-29'"], ["'2024-02-27'", "'2024-03-01'"]),
    "timestamp": ("{moment}", ["'2024-01-01 00:00:00'", "'2024-01-01 10:00:00.123456'"],
                  ["'2024-01-01 10:00:00.123455'", "'2024-01-01 10:00:00.123457'"]),
    "zoned": ("{zoned}", ["'2024-03-31 00:59:59'", "'2024-03-31 01:00:00.5'"],
              ["'2024-03-31 01:00:00.4'", "'2024-03-31 01:00:00.6'"]),
    # By bytes: capitals come before small letters, in most collations of servers they do not.
    "text": ("varchar(20)", ["'A'", "'a'"], ["'B'", "'b''\\'"]),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("postgres_scanner", "mysql_scanner", "ducklake", "sqlite_scanner"))


@find_postgres().needed()
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["append", "merge"])
def test_postgres_gives_what_is_beyond_the_cursor(tmp_path: Path, mode: str):
    schema = f"pw_{uuid.uuid4().hex[:10]}"
    psql(f"CREATE SCHEMA {schema}")
    try:
        check(
            tmp_path,
            mode,
            f"postgresql://postgres@{find_postgres()}/test?schema={schema}",
            {"moment": "timestamp", "zoned": "timestamptz"},
            lambda sql: psql(f"SET timezone = 'UTC'; {sql}", schema),
        )
    finally:
        psql(f"DROP SCHEMA {schema} CASCADE")


@find_mariadb().needed()
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["append", "merge"])
def test_mariadb_gives_what_is_beyond_the_cursor(tmp_path: Path, mode: str):
    database = f"pw_{uuid.uuid4().hex[:10]}"
    before = "SET time_zone = '+00:00', sql_mode = 'NO_BACKSLASH_ESCAPES'"
    mariadb(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
    try:
        check(
            tmp_path,
            mode,
            f"mysql://root@{find_mariadb()}/{database}",
            {"moment": "datetime(6)", "zoned": "timestamp(6) null"},
            lambda sql: mariadb(f"{before}; {sql}", database),
        )
    finally:
        mariadb(f"DROP DATABASE {database}")


#: Of the formats that know no types, or of which a reader guesses them: what the contract says.
_TYPES = {"timestamp": "TIMESTAMP", "text": "VARCHAR"}


@pytest.mark.parametrize(
    ("format_", "mode"), [("duckdb", "merge"), ("csv", "append"), ("json", "merge"), ("parquet", "append")]
)
def test_files_give_what_is_beyond_the_cursor(tmp_path: Path, format_: str, mode: str):
    cases = {name: CASES[name] for name in _TYPES}
    file = tmp_path / "source.duckdb"
    folder = tmp_path / "data"
    folder.mkdir()

    def execute(sql: str) -> str:
        with duckdb.connect(str(file)) as database:
            database.execute(sql)
            for (table,) in database.execute("select table_name from duckdb_tables()").fetchall():
                database.execute(f"copy {table} to '{folder / table}.{format_}'" if format_ != "duckdb" else "select 1")
        return ""

    url = "duckdb:///source.duckdb" if format_ == "duckdb" else "file:///data"
    key = 'key = ["id"]\n' if mode == "merge" else ""
    untyped = 'id = "BIGINT", ' if format_ in ("csv", "json") else ""
    more = {name: f'columns = {{ {untyped}c = "{type_}" }}\n{key}' for name, type_ in _TYPES.items()}
    check(tmp_path, mode, url, {"moment": "timestamp"}, execute, cases=cases, more=more)


def check(
    root: Path,
    mode: str,
    url: str,
    names: dict[str, str],
    execute: Callable[[str], str],
    *,
    cases: Mapping[str, Case] = CASES,
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    # An append without a key takes what is strictly beyond the last cursor, a merge rows with the same one too.
    key = " primary key" if mode == "merge" else ""
    for case, (declared, first, _) in cases.items():
        execute(f"CREATE TABLE {case}_case (id integer{key}, c {declared.format(**names)}); {insert(case, 1, first)}")
    project = write(root, url, mode, {case: more.get(case, "") for case in cases})
    load(project, "b0")

    for case, (_, first, later) in cases.items():
        last = "NULL" if mode == "merge" else first[1]
        execute(f"{insert(case, 3, later)}; {insert(case, 5, [last])}")
    load(project, "b1")
    load(project, "b2")

    expected = {"merge": [1, 2, 4, 5], "append": [1, 2, 4]}[mode]
    with open_reader(project, SETTINGS) as connection:
        for case in cases:
            loaded, again = (read_manifest(project, batch, f"{case}_case") for batch in ("b1", "b2"))
            assert loaded.rows == loaded.source_rows == {"merge": 3, "append": 1}[mode], case
            assert again.rows == {"merge": 2, "append": 0}[mode], case
            assert connection.execute(f"select list(id order by id) from {case}_case").fetchone() == (expected,), case


def insert(case: str, start: int, values: list[str]) -> str:
    rows = ", ".join(f"({number}, {value})" for number, value in enumerate(values, start=start))
    return f"INSERT INTO {case}_case VALUES {rows}"


def write(root: Path, url: str, mode: str, more: Mapping[str, str]) -> Project:
    tables = "".join(f'[table.{case}_case]\nmode = "{mode}"\ncursor = "c"\n{text}' for case, text in more.items())
    text = f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{tables}'
    (root / "phasewise.toml").write_text(text, encoding="utf-8")
    return load_project(root)


def load(project: Project, batch: str) -> None:
    stage_batch(project, batch=batch)
    publish_sample(project, SETTINGS, batch)
