"""Staged Parquet: every value comes back as it was, in encodings that other readers can read too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import open_session
from phasewise.project.config import load_project
from phasewise.settings import Settings
from phasewise.sources import Column, SourceTable
from phasewise.staging.extract import extract_table
from phasewise.staging.extraction import fix_parquet, write_parquet
from phasewise.staging.manifest import staged_files

SETTINGS = Settings(threads=2, memory_limit="256MB", min_free_bytes=0)

#: Type → values at its borders.
BORDERS = {
    "TINYINT": ["-128", "127", "0"],
    "SMALLINT": ["-32768", "32767", "0"],
    "INTEGER": ["'-2147483648'", "2147483647", "0"],
    "UINTEGER": ["0", "4294967295"],
    "BIGINT": ["'-9223372036854775808'", "9223372036854775807", "0"],
    "UBIGINT": ["0", "18446744073709551615"],
    "DECIMAL(9,2)": ["-9999999.99", "9999999.99", "0"],
    "DECIMAL(18,4)": ["-99999999999999.9999", "99999999999999.9999"],
    "DECIMAL(38,10)": [f"'{sign}{'9' * 28}.{'9' * 10}'" for sign in ("-", "")],
    "FLOAT": ["'nan'", "'-inf'", "1e-45", "'-0.0'"],
    "DOUBLE": ["'nan'", "'inf'", "'-inf'", "5e-324", "1.7976931348623157e308", "'-0.0'"],
    "BOOLEAN": ["true", "false"],
    "VARCHAR": ["''", "'é'", "chr(0)", "repeat('long ', 500)"],
    "BLOB": ["''", r"'\x00\xFF'"],
    "DATE": ["'infinity'", "'-infinity'", "'4714-11-24 (BC)'", "'5874897-12-31'", "'1970-01-01'"],
    "TIME": ["'00:00:00'", "'23:59:59.999999'"],
    "TIMESTAMP": ["'infinity'", "'-infinity'", "'0001-01-01'", "'294246-12-31 23:59:59.999999'"],
    "TIMESTAMP WITH TIME ZONE": ["'infinity'", "'-infinity'", "'0001-01-01'", "'294246-12-31 23:59:59.999999'"],
    "UUID": ["'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"],
}
#: Type → an expression for more values than a dictionary may have, further apart than 2^31.
SPREAD = {
    "INTEGER": "CASE range % 2 WHEN 0 THEN -2147483648 + range ELSE 2147483647 - range END::INTEGER",
    "UINTEGER": "CASE range % 2 WHEN 0 THEN range ELSE 4294967295 - range END::UINTEGER",
    "DATE": "CASE range % 2 WHEN 0 THEN DATE 'infinity' ELSE DATE '1969-12-31' - range::INTEGER END",
}


#: Tables that are said to be small and large.
SMALL = SourceTable(name="t", columns=(), row_estimate=None)
LARGE = SourceTable(name="t", columns=(), row_estimate=1_000_000)


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with open_session(SETTINGS, extensions=()) as connection:
        yield connection


def list_encodings(connection: duckdb.DuckDBPyConnection, file: Path) -> set[str]:
    query = "SELECT encodings FROM parquet_metadata(?) WHERE path_in_schema = 'value'"
    return {row[0] for row in connection.execute(query, [str(file)]).fetchall()}


@pytest.mark.parametrize("rows", [1, 129, 40_000])
@pytest.mark.parametrize("table", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("type_name", BORDERS)
def test_values_at_the_borders_of_a_type_come_back(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path, type_name: str, table: SourceTable, rows: int
):
    file = tmp_path / "rows.parquet"
    values = ", ".join(f"CAST({value} AS {type_name})" for value in ["NULL", *BORDERS[type_name]])
    connection.execute(
        "CREATE TABLE t AS SELECT range AS id, v[(hash(range) % len(v))::INTEGER + 1] AS value "
        f"FROM (SELECT [{values}] AS v), range({rows})"
    )

    assert write_parquet(connection, "FROM t", file, table) == rows
    fix_parquet(connection, file)

    read = f"SELECT id, value, typeof(value), value::VARCHAR FROM read_parquet({quote_literal(str(file))})"
    written = "SELECT id, value, typeof(value), value::VARCHAR FROM t"
    for more, less in ((read, written), (written, read)):
        assert connection.execute(f"({more}) EXCEPT ALL ({less})").fetchall() == []


def test_numbers_are_stored_by_their_differences(connection: duckdb.DuckDBPyConnection, tmp_path: Path):
    file = tmp_path / "rows.parquet"

    write_parquet(connection, "SELECT range::INTEGER AS value FROM range(100_000)", file, LARGE)
    fix_parquet(connection, file)

    assert list_encodings(connection, file) == {"DELTA_BINARY_PACKED"}
    assert file.stat().st_size < 10_000


@pytest.mark.parametrize("type_name", SPREAD)
def test_numbers_that_are_too_far_apart_for_other_readers_are_stored_plainly(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path, type_name: str
):
    file = tmp_path / "rows.parquet"
    query = f"SELECT range AS id, {SPREAD[type_name]} AS value FROM range(100_000)"

    write_parquet(connection, query, file, LARGE)
    before = list_encodings(connection, file)
    fix_parquet(connection, file)

    assert "DELTA_BINARY_PACKED" in before  # DuckDB alone could read these
    assert "DELTA_BINARY_PACKED" not in list_encodings(connection, file)
    assert connection.execute(f"({query}) EXCEPT (FROM read_parquet('{file}'))").fetchall() == []
    assert list(tmp_path.iterdir()) == [file]


def test_an_extraction_leaves_a_file_that_other_readers_can_read(tmp_path: Path):
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "duckdb:///source.duckdb"\n')
    with closing(duckdb.connect(str(tmp_path / "source.duckdb"))) as source:
        source.execute(f"CREATE TABLE crc AS SELECT {SPREAD['INTEGER']} AS value FROM range(200_000)")
    project = load_project(tmp_path)

    manifest = extract_table(project, SETTINGS, batch="b1", table="crc")

    [file] = staged_files(project, manifest)
    assert file.stat().st_size == manifest.size_bytes
    with open_session(SETTINGS, extensions=()) as connection:
        assert "DELTA_BINARY_PACKED" not in list_encodings(connection, file)


def test_a_column_of_a_large_table_has_a_dictionary_where_its_values_occur_often(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path
):
    often, rarely = tmp_path / "often.parquet", tmp_path / "rarely.parquet"

    write_parquet(connection, "SELECT hash(range % 10_000)::VARCHAR AS value FROM range(100_000)", often, LARGE)
    write_parquet(connection, "SELECT hash(range % 15_000)::VARCHAR AS value FROM range(100_000)", rarely, LARGE)

    assert list_encodings(connection, often) == {"RLE_DICTIONARY"}
    assert list_encodings(connection, rarely) == {"DELTA_LENGTH_BYTE_ARRAY"}


def test_a_wide_table_is_written_in_little_memory(tmp_path: Path):
    columns = tuple(Column(name=f"c{n}", source_type="", type="BIGINT", nullable=True) for n in range(1600))
    table = SourceTable(name="t", columns=columns, row_estimate=1_000_000)
    query = f"SELECT {', '.join(f'range + {n} AS c{n}' for n in range(1600))} FROM range(3)"
    settings = SETTINGS.model_copy(update={"memory_limit": SETTINGS.extract_memory_limit})

    with open_session(settings, extensions=()) as connection:
        assert write_parquet(connection, query, tmp_path / "rows.parquet", table) == 3


def test_long_texts_of_a_large_table_are_written_in_little_memory(tmp_path: Path):
    query = "SELECT range AS id, repeat(hash(range)::VARCHAR, 60) AS value FROM range(100_000)"  # 110 MB
    settings = Settings(threads=1, memory_limit="130MB", min_free_bytes=0)

    with open_session(settings, extensions=()) as connection:
        assert write_parquet(connection, query, tmp_path / "rows.parquet", LARGE) == 100_000
