"""DuckDB files."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from phasewise.errors import SourceUnavailable
from phasewise.project.config import Project
from phasewise.sources import open_source
from phasewise.staging.extract import extract_table
from phasewise.staging.source_snapshot import open_snapshot
from tests.unit.sources.projects import SETTINGS, make_project, read


def make_duckdb(root: Path, script: str, more: str = "") -> Project:
    with duckdb.connect(str(root / "source.duckdb"), config={"threads": 1}) as connection:
        connection.execute(script)
    return make_project(root, "duckdb:///source.duckdb", more)


def test_a_duckdb_table_arrives_and_what_parquet_would_change_is_text(tmp_path: Path):
    project = make_duckdb(
        tmp_path,
        """
        CREATE TYPE mood AS ENUM ('sad');
        CREATE TABLE t (id INTEGER PRIMARY KEY, u UBIGINT, n DECIMAL(38,2), "at" TIMESTAMPTZ, j JSON, h HUGEINT,
            i INTERVAL, m mood, l INTEGER[], ns TIMESTAMP_NS, tz TIMETZ, b BIT);
        INSERT INTO t VALUES (1, 18446744073709551615, 1.25, '2024-01-01 00:00:00+00', '{"a":  1}',
            170141183460469231731687303715884105727, INTERVAL '1 month 1 microsecond', 'sad', [1, NULL],
            '2024-01-01 00:00:00.123456789', '10:00:00+05', '101');
        CREATE VIEW v AS SELECT 1 AS one;
        """,
    )

    types, rows = read(project, "t")

    assert types == ["INTEGER", "UBIGINT", "DECIMAL(38,2)", "TIMESTAMP WITH TIME ZONE", *["VARCHAR"] * 8]
    assert rows == [
        (1, 2**64 - 1, Decimal("1.25"), dt.datetime(2024, 1, 1, tzinfo=dt.UTC), '{"a":  1}', str(2**127 - 1),
         "1 month 00:00:00.000001", "sad", "[1, NULL]", "2024-01-01 00:00:00.123456789", "10:00:00+05", "101")
    ]  # fmt: skip
    source = open_source(project, SETTINGS)
    assert source.describe_table("t").key == ("id",)
    assert source.list_tables() == ["t"]
    assert read(project, "v")[1] == [(1,)]


def test_nobody_writes_to_a_duckdb_file_while_its_snapshot_is_held(tmp_path: Path):
    project = make_duckdb(tmp_path, "CREATE TABLE t (a INTEGER)")
    write = [sys.executable, "-c", "import duckdb, sys; duckdb.connect(sys.argv[1])", str(tmp_path / "source.duckdb")]

    with open_snapshot(project, SETTINGS, "b1") as token:
        assert subprocess.run(write, capture_output=True, timeout=50, check=False).returncode != 0
        manifest = extract_table(project, SETTINGS, batch="b1", table="t", snapshot=token)

    assert manifest.snapshot == token["id"]
    assert subprocess.run(write, capture_output=True, timeout=50, check=False).returncode == 0


def test_a_duckdb_file_that_is_missing_or_no_database_is_named(tmp_path: Path):
    project = make_project(tmp_path, "duckdb:///source.duckdb")
    with pytest.raises(SourceUnavailable, match="does not exist"):
        open_source(project, SETTINGS).check()

    (tmp_path / "source.duckdb").write_text("no database" * 1000)

    with pytest.raises(SourceUnavailable, match="cannot be opened"):
        open_source(project, SETTINGS).check()
