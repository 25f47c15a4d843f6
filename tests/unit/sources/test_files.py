"""Folders of files."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import re
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

import phasewise
from phasewise.errors import ProjectError, SchemaDrift, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.sources import check_project, list_project_tables, open_source
from phasewise.staging.extract import extract_table
from phasewise.staging.source_snapshot import open_snapshot
from tests.unit.sources.projects import SETTINGS, make_project, read


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
@pytest.mark.parametrize("url", ["file:///json=3/id=9/day=5", "file:///json=3/id=9/*"])
def test_folders_that_are_called_key_equals_value_change_no_column_and_add_none(tmp_path: Path, kind: str, url: str):
    folder = tmp_path / "json=3" / "id=9" / "day=5" / "v=late"
    folder.mkdir(parents=True)
    with duckdb.connect(config={"threads": 1}) as connection:
        for number, value in enumerate("xy", start=1):
            connection.execute(f"COPY (SELECT {number} AS id, '{value}' AS v) TO '{folder / value}.{kind}'")
            connection.execute(f"COPY (SELECT {number} AS id, '{value}' AS v) TO '{folder.parent / value}.{kind}'")
    project = make_project(tmp_path, url, "[table.x]\n[table.'v=late']\n")
    tables = open_source(project, SETTINGS).list_tables()

    found = {table: read(project, table) for table in tables}

    types, (one, two) = ["VARCHAR", "VARCHAR"], (("1", "x"), ("2", "y"))
    if kind == "parquet":
        types, (one, two) = ["INTEGER", "VARCHAR"], ((1, "x"), (2, "y"))
    if url.endswith("*"):
        assert found == {"day=5": (types, [one, two])}
    else:
        assert found == {"v=late": (types, [one, two]), "x": (types, [one]), "y": (types, [two])}


def test_each_reader_of_files_leaves_the_names_of_folders_alone():
    code = Path(phasewise.__file__).parent
    calls = [
        line.strip()
        for path in code.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"(read_(csv|json|parquet)\w*)\((\{|\[\{|\?)", line)
    ]

    assert len(calls) >= 5
    assert [call for call in calls if not re.search("hive_partitioning = false|_PLAIN_PATHS", call)] == []


def test_quotes_are_quotes_and_rows_are_rows_wherever_they_come_first_in_a_csv_file(tmp_path: Path):
    (tmp_path / "late.csv").write_text(
        "id,name\n"
        + "".join(f"{number},n{number}\n" for number in range(100_000, 160_000))
        + '2,"abc"\n3,""\n4,\n#5,x\n'
    )
    (tmp_path / "early.csv").write_text("id,name\n1,'a'\n#2,x\n3,b\n")
    project = make_project(tmp_path, "file:///*.csv")

    late, early = read(project, "late")[1], read(project, "early")[1]

    assert len(late) == 60_004
    assert [row for row in late if len(row[0]) < 6] == [("#5", "x"), ("2", "abc"), ("3", ""), ("4", None)]
    assert early == [("#2", "x"), ("1", "'a'"), ("3", "b")]


def fill_folder(root: Path) -> None:
    folder = root / "data"
    (folder / "parts").mkdir(parents=True)
    (folder / "player.csv").write_text('id,"the name",note\n007,"a ""b""\nc",\n8,é,""\n', encoding="utf-8")
    (folder / "zipped.csv.gz").write_bytes(gzip.compress(b"a;b\n1;2\n"))
    (folder / "parts" / "1.csv").write_text("a,b\n1,2\n")
    (folder / "parts" / "2.csv").write_text("b,a\n3,4\n")
    lines = [{"id": 12345678901234567890, "x/y": "2024-01-01", "o": {"k": 1}}, {"id": None, "z": 0.1}]
    (folder / "events.ndjson").write_text("\n".join(map(json.dumps, lines)))
    (folder / "list.json").write_text(json.dumps([{"a": "1"}, {"a": 2}]))
    (folder / "odd [1]*.csv").write_text("a\n1\n")
    (folder / "README.md").write_text("no table")
    (folder / "_SUCCESS").write_text("")
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute(f"COPY (SELECT 1 AS id, DATE '2024-01-01' AS day) TO '{folder}/facts.parquet'")


def test_a_folder_of_files_is_a_database_of_tables(tmp_path: Path):
    fill_folder(tmp_path)
    project = make_project(tmp_path, "file:///data")

    tables = list_project_tables(project, open_source(project, SETTINGS))

    assert tables == ["events", "facts", "list", "odd [1]*", "parts", "player", "zipped"]
    assert check_project(project, SETTINGS) == []
    assert read(project, "player")[1] == [("007", 'a "b"\nc', None), ("8", "é", "")]
    assert read(project, "zipped")[1] == [("1", "2")]
    assert read(project, "parts")[1] == [("1", "2"), ("4", "3")]
    assert read(project, "events")[1] == [
        ("12345678901234567890", '{"k":1}', "2024-01-01", None),
        (None, None, None, "0.1"),
    ]
    assert read(project, "list")[1] == [("1",), ("2",)]
    assert read(project, "odd [1]*")[1] == [("1",)]
    assert read(project, "facts") == (["INTEGER", "DATE"], [(1, dt.date(2024, 1, 1))])


def test_a_pattern_selects_files(tmp_path: Path):
    fill_folder(tmp_path)

    assert open_source(make_project(tmp_path, "file:///data/p*.csv"), SETTINGS).list_tables() == ["player"]
    with pytest.raises(SourceUnavailable, match="No file matches"):
        open_source(make_project(tmp_path, "file:///data/q*.csv"), SETTINGS).check()
    with pytest.raises(SourceUnavailable, match="No file matches"):
        open_source(make_project(tmp_path, "file:///nowhere"), SETTINGS).check()
    with pytest.raises(SourceUnavailable, match="There is no folder for"):
        open_source(make_project(tmp_path, "file:///nowhere/x"), SETTINGS).check()
    with pytest.raises(TableMissing, match="player"):
        open_source(make_project(tmp_path, "file:///data"), SETTINGS).describe_table("plaier")


def test_a_contract_gives_texts_types_and_checks_every_value(tmp_path: Path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "t.csv"
    more = '[table.t]\nkey = ["id"]\ncolumns = { id = "BIGINT", n = "DECIMAL(5,2)", d = "DATE", f = "DOUBLE" }\n'
    project = make_project(tmp_path, "file:///data", more)
    file.write_text("id,n,d,f\n1,1.5,2024-02-29,1e3\n2,,,\n")
    assert read(project, "t")[1] == [(1, Decimal("1.50"), dt.date(2024, 2, 29), 1000.0), (2, None, None, None)]

    for bad in ("007,1,2024-01-01,1", "7,1.005,2024-01-01,1", "7,1,2024-02-30,1", "7,1,2024-01-01,one"):
        file.write_text(f"id,n,d,f\n{bad}\n")
        with pytest.raises(UnfaithfulValue, match=r"1 row holds a value.*\(id = 0*7\)"):
            read(project, "t")

    file.write_text("id,n,d\n1,1,2024-01-01\n")
    assert [type(problem) for problem in check_project(project, SETTINGS)] == [SchemaDrift]


def test_a_file_that_changes_during_the_batch_fails_its_table(tmp_path: Path):
    fill_folder(tmp_path)
    project = make_project(tmp_path, "file:///data")

    with open_snapshot(project, SETTINGS, "b1") as token:
        extract_table(project, SETTINGS, batch="b1", table="player", snapshot=token)
        (tmp_path / "data" / "zipped.csv.gz").write_bytes(gzip.compress(b"a;b\n1;3\n"))
        with pytest.raises(SourceUnavailable, match="have changed since the batch began"):
            extract_table(project, SETTINGS, batch="b1", table="zipped", snapshot=token)


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    fill_folder(tmp_path)
    (tmp_path / "data" / "player.json").write_text("[]")

    with pytest.raises(ProjectError, match='Two files of .* are the table "player"'):
        open_source(make_project(tmp_path, "file:///data"), SETTINGS).check()
