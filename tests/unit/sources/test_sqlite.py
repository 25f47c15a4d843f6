"""SQLite: every value arrives as it was, or the extraction fails and says where."""

from __future__ import annotations

import datetime as dt
import math
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phasewise.errors import ProjectError, SchemaDrift, SourceError, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.sources import check_project, list_project_tables, open_source
from phasewise.staging.batch import begin_batch, list_batches, new_batch_id
from phasewise.staging.extract import extract_table
from phasewise.staging.extraction import read_rows
from phasewise.staging.manifest import Manifest, staged_files
from phasewise.staging.source_snapshot import open_snapshot
from tests.staged import read_manifest

SETTINGS = Settings(threads=2, memory_limit="256MB", connect_timeout=0.2)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner",))


def make_project(root: Path, script: str = "", more: str = "", url: str = "sqlite:///source.db") -> Project:
    (root / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
    if script:
        with closing(sqlite3.connect(root / "source.db")) as source, source:
            source.executescript(script)
    return load_project(root)


def read(project: Project, table: str) -> tuple[list[str], list[tuple]]:
    """Extract *table* into a batch of its own and return types and rows as staged."""
    manifest = extract_table(project, SETTINGS, batch=new_batch_id(), table=table)
    assert manifest.rows == manifest.source_rows
    with open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for path in staged_files(project, manifest)]
        result = connection.execute("FROM read_parquet(?)", [files])
        types = [str(column[1]) for column in result.description]
        assert [column[0] for column in result.description] == [column.name for column in manifest.columns]
        return types, result.fetchall()


def test_a_table_of_plain_columns_arrives_as_it_is(tmp_path: Path):
    project = make_project(
        tmp_path,
        """
        CREATE TABLE t (i INTEGER, r REAL, x TEXT);
        INSERT INTO t VALUES (1, 1.5, 'a'), (NULL, NULL, NULL), (-9223372036854775808, -0.0, ''),
            (9223372036854775807, 5e-324, char(0x1F600)), (0, 9e999, 'a' || char(0) || 'b');
        """,
    )

    types, rows = read(project, "t")

    assert types == ["BIGINT", "DOUBLE", "VARCHAR"]
    assert rows == [
        (1, 1.5, "a"),
        (None, None, None),
        (-(2**63), 0.0, ""),
        (2**63 - 1, 5e-324, "😀"),
        (0, math.inf, "a\0b"),
    ]


@pytest.mark.parametrize(
    ("declared", "value", "kind"),
    [
        ("INTEGER", "'abc'", "text 'abc'"),
        ("INTEGER", "''", "text ''"),
        ("INTEGER", "1.5", "real 1.5"),
        ("INTEGER", "x'00ff'", "blob x'00FF'"),
        ("REAL", "'abc'", "text 'abc'"),
        ("TEXT", "x'00'", "blob x'00'"),
        ("TEXT", "CAST(x'ff41' AS TEXT)", "text '\\\\xffA'"),
        ("BLOB", "'abc'", "text 'abc'"),
        ("BLOB", "5", "integer 5"),
        ("NUMERIC", "9007199254740993", "integer 9007199254740993"),
        ("DECIMAL(5,2)", "1.005", "real 1.005"),
        ("DECIMAL(5,2)", "100000", "integer 100000"),
        ("DECIMAL(5,2)", "'abc'", "text 'abc'"),
        ("BOOLEAN", "2", "integer 2"),
        ("DATE", "'2024-02-31'", "text '2024-02-31'"),
        ("DATE", "'2024-02-01 10:00:00'", "text"),
        ("DATE", "2460000", "integer 2460000"),
        ("TIMESTAMP", "'2024-02-01T10:00:00Z'", "text"),
        ("TIMESTAMP", "'2024-02-01 10:00:00.1234567'", "text"),
        ("TIMESTAMP", "1700000000", "integer 1700000000"),
        ("TIME", "'25:00:00'", "text '25:00:00'"),
        ("", "x'00'", "blob x'00'"),
        ("JSON", "x'00'", "blob x'00'"),
    ],
)
def test_a_value_that_would_change_fails_with_its_column_and_row(tmp_path, declared, value, kind):
    project = make_project(
        tmp_path,
        f"""
        CREATE TABLE t (id INTEGER PRIMARY KEY, "the column" {declared});
        INSERT INTO t VALUES (1, NULL), (77, {value});
        """,
    )

    pattern = f'Table "t", column "the column" .*1 row holds .*first \\(id = 77\\) is the {kind}.*= "(VARCHAR|BLOB)"'
    with pytest.raises(UnfaithfulValue, match=pattern):
        read(project, "t")


@pytest.mark.parametrize("kind", ["INTEGER", "DATE"])  # scanned directly, and read as tagged text
def test_a_value_that_would_change_is_of_no_matter_where_the_condition_excludes_it(tmp_path: Path, kind: str):
    more = "[table.t]\nwhere = \"id < 2 and typeof(v) <> 'text'\"\n"
    script = f"CREATE TABLE t (id INTEGER, v {kind}); INSERT INTO t VALUES (1, NULL), (1, 'abc'), (2, 'x')"

    assert read(make_project(tmp_path, script, more), "t")[1] == [(1, None)]


def test_the_sample_row_is_named_by_rowid_where_there_is_no_key(tmp_path: Path):
    project = make_project(tmp_path, "CREATE TABLE t (i INTEGER); INSERT INTO t VALUES (1), ('x'), ('y');")

    with pytest.raises(UnfaithfulValue, match=r"2 rows hold values .* the first \(rowid = 2\) is the text 'x'"):
        read(project, "t")


def test_the_sample_row_is_named_by_the_key_of_the_project(tmp_path: Path):
    more = '[table.t]\nkey = ["a", "b"]\n'
    project = make_project(tmp_path, "CREATE TABLE t (a TEXT, b INT, c INT); INSERT INTO t VALUES ('k', 2, '?')", more)

    with pytest.raises(UnfaithfulValue, match=r"\(a = 'k', b = 2\)"):
        read(project, "t")


def test_a_contract_carries_a_column_as_text_and_the_manifest_says_so(tmp_path: Path):
    more = '[table.t.columns]\nv = "VARCHAR"\n'
    script = "CREATE TABLE t (v INTEGER); INSERT INTO t VALUES (1), ('abc'), (1.5), (1e300), (0.1), (NULL), ('')"
    project = make_project(tmp_path, script, more)

    types, rows = read(project, "t")

    assert types == ["VARCHAR"]
    assert rows == [("1",), ("abc",), ("1.5",), ("1e+300",), ("0.1",), (None,), ("",)]
    batch = list_batches(project)[0].id
    note = read_manifest(project, batch, "t").columns[0].note
    assert note == "carried as VARCHAR because the contract says so; naturally BIGINT"


def test_a_contract_carries_text_that_is_not_utf8_as_bytes(tmp_path: Path):
    more = '[table.t.columns]\nv = "BLOB"\n'
    project = make_project(tmp_path, "CREATE TABLE t (v TEXT); INSERT INTO t VALUES (CAST(x'ff41' AS TEXT))", more)

    assert read(project, "t") == (["BLOB"], [(b"\xffA",)])


def test_declared_types_of_the_numeric_family_get_the_type_that_they_name(tmp_path: Path):
    project = make_project(
        tmp_path,
        """
        CREATE TABLE t (
            d DECIMAL(10,2), n NUMERIC, b BOOLEAN, day DATE, at DATETIME, clock TIME, raw BLOB, big DECIMAL(38,0)
        );
        INSERT INTO t VALUES (3.14, 2.5, 1, '2024-02-29', '2024-02-29T23:59:59.5', '23:59:59.25', x'00ff', 12),
            (100, 9007199254740992, 0, '0001-01-01', '1969-12-31 00:00:00', '00:00:00', x'', -1),
            (NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
        """,
    )

    types, rows = read(project, "t")

    names = ["DECIMAL(10,2)", "DOUBLE", "BOOLEAN", "DATE", "TIMESTAMP", "TIME", "BLOB", "DECIMAL(38,0)"]
    assert types == names
    first, second, empty = rows
    assert first == (
        Decimal("3.14"),
        2.5,
        True,
        dt.date(2024, 2, 29),
        dt.datetime(2024, 2, 29, 23, 59, 59, 500000),
        dt.time(23, 59, 59, 250000),
        b"\x00\xff",
        Decimal(12),
    )
    assert second[:4] == (Decimal(100), 2.0**53, False, dt.date(1, 1, 1))
    assert second[6:] == (b"", Decimal(-1))
    assert empty == (None,) * 8


def test_columns_without_a_type_that_sqlite_knows_are_carried_as_text(tmp_path: Path):
    project = make_project(
        tmp_path, "CREATE TABLE t (a, j JSON); INSERT INTO t VALUES (1, '{}'), ('1', 2), (0.1, NULL)"
    )

    table = open_source(project, SETTINGS).describe_table("t")
    types, rows = read(project, "t")

    assert [column.note for column in table.columns] == [
        "carried as text: the column has no declared type",
        "carried as text: neither SQLite nor the warehouse has a type JSON",
    ]
    assert (types, rows) == (["VARCHAR", "VARCHAR"], [("1", "{}"), ("1", "2"), ("0.1", None)])


def test_generated_columns_arrive(tmp_path: Path):
    project = make_project(
        tmp_path,
        """
        CREATE TABLE t (a INTEGER, v INTEGER AS (a * 2), s TEXT AS (a || '!') STORED, r REAL AS (a / 3.0));
        INSERT INTO t (a) VALUES (1), (7);
        """,
    )

    types, rows = read(project, "t")

    assert types == ["BIGINT", "BIGINT", "VARCHAR", "DOUBLE"]
    assert rows == [(1, 2, "1!", 1 / 3.0), (7, 14, "7!", 7 / 3.0)]


def test_views_are_extracted_only_when_they_are_named(tmp_path: Path):
    script = "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (5); CREATE VIEW v AS SELECT a, a + 1 AS b FROM t"
    project = make_project(tmp_path, script)
    assert list_project_tables(project, open_source(project, SETTINGS)) == ["t"]

    project = make_project(tmp_path, more='[tables]\ninclude = ["*", "v"]\n')

    assert list_project_tables(project, open_source(project, SETTINGS)) == ["t", "v"]
    assert read(project, "v")[1] == [(5, "6")]


def test_insides_of_sqlite_are_no_tables(tmp_path: Path):
    project = make_project(
        tmp_path,
        """
        CREATE TABLE sqliteish (id INTEGER PRIMARY KEY AUTOINCREMENT);
        CREATE VIRTUAL TABLE f USING fts5(body);
        CREATE TABLE w (a INTEGER PRIMARY KEY) WITHOUT ROWID;
        CREATE TABLE s (a INTEGER) STRICT;
        """,
    )

    assert open_source(project, SETTINGS).list_tables() == ["s", "sqliteish", "w"]


@pytest.mark.parametrize("other", ["TEXT", "DATE"])  # scanned directly, and read as tagged text
def test_hard_names_arrive(tmp_path: Path, other: str):
    names = ['a"b', "select", "a b", "😀", "a'b", "rowid", "c0", "$1", "a;b", "-- c", "{x}", "ß", "a\\b", "?"]
    kinds = ["TEXT", other] * 7
    columns = ", ".join(f"{quote_identifier(name)} {kind}" for name, kind in zip(names, kinds, strict=True))
    table = "O'dd \"t\\ -- ?"
    project = make_project(tmp_path, f"CREATE TABLE {quote_identifier(table)} ({columns})")
    with closing(sqlite3.connect(tmp_path / "source.db")) as source, source:
        row = ["2024-01-01"] * len(names)
        source.execute(f"INSERT INTO {quote_identifier(table)} VALUES ({','.join('?' * len(names))})", row)

    _, rows = read(project, table)

    assert [str(value) for value in rows[0]] == row


@pytest.mark.parametrize("other", ["TEXT", "BLOB"])  # scanned directly, and read as tagged text
def test_values_of_four_mebibytes_arrive(tmp_path: Path, other: str):
    project = make_project(tmp_path, f"CREATE TABLE t (x TEXT, y {other})")
    text, rest = "é" * 2**21, "z" * 2**22 if other == "TEXT" else b"\0\xff" * 2**21
    with closing(sqlite3.connect(tmp_path / "source.db")) as source, source:
        source.execute("INSERT INTO t VALUES (?, ?)", (text, rest))

    assert read(project, "t")[1] == [(text, rest)]


@pytest.mark.parametrize("kind", ["INTEGER", "NUMERIC"])
def test_a_table_may_have_1600_columns(tmp_path: Path, kind: str):
    columns = ", ".join(f"c{index} {kind}" for index in range(1600))
    script = f"CREATE TABLE t ({columns}); INSERT INTO t VALUES ({', '.join(map(str, range(1600)))})"

    assert read(make_project(tmp_path, script), "t")[1] == [tuple(range(1600))]


any_double = st.binary(min_size=8, max_size=8).map(lambda b: struct.unpack("d", b)[0]).filter(lambda f: f == f)
any_text = st.text(st.characters(exclude_categories=["Cs"]))
any_integer = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.none() | any_integer,
            st.none() | any_double | st.floats(allow_nan=False),
            st.none() | any_text,
            st.none() | st.binary(),
            st.none() | st.dates(),
            st.none() | st.datetimes(),
            st.none() | st.decimals(-(10**10), 10**10, places=3),
        ),
        max_size=20,
    ),
    is_plain=st.booleans(),
)
def test_any_value_comes_back_as_it_was(tmp_path_factory, rows, is_plain):
    root = tmp_path_factory.mktemp("any")
    columns = "i INTEGER, r REAL, x TEXT" + ("" if is_plain else ", b BLOB, d DATE, t TIMESTAMP, n DECIMAL(18,3)")
    project = make_project(root, f"CREATE TABLE t ({columns})")
    width = 3 if is_plain else 7
    sent = [
        (i, r, x, b, d and d.isoformat(), t and t.isoformat(" "), None if n is None else str(n))
        for i, r, x, b, d, t, n in rows
    ]
    with closing(sqlite3.connect(root / "source.db")) as source, source:
        source.executemany(f"INSERT INTO t VALUES ({','.join('?' * width)})", [row[:width] for row in sent])

    _, got = read(project, "t")

    assert got == [row[:width] for row in rows]


#: Declared types whose columns are scanned when SQLite finds no value in them that the scanner would change.
SCANNED = {
    "BLOB": "BLOB",
    "BOOLEAN": "BIGINT",
    "DATE": "DATE",
    "DATETIME": "TIMESTAMP",
    "DEC(15, 2)": "DOUBLE",
    "DECIMAL(18,2)": "DOUBLE",
    "DECIMAL": "DOUBLE",
    "NUMBER(38,10)": "DOUBLE",
    "NUMERIC": "DOUBLE",
    "TIMESTAMP": "TIMESTAMP",
}
MOMENTS = """2024-01-05|2024-1-5|2024-01-5 | 024-01-05|2024/01/05|2024-01-05 |2024-01-05\0x|2024-02-29|2023-02-29
0000-01-01|0001-01-01|9999-12-31|10000-01-01|infinity|0044-03-15 (BC)|20240105|2024-01-05 10:00|2024-01-05 10:00:00
2024-01-05T10:00:00|2024-01-05t10:00:00|2024-01-05  10:00:0|2024-01-05 24:00:00|2024-01-05 23:59:60|0000-01-01 00:00:00
2024-01-05 10:00:00Z|2024-01-05 10:00:00+01:00|2024-01-05 10:00:00.5|2024-01-05 10:00:00.123|2024-01-05 10:00:00.12x
2024-01-05T10:00:00.123456|2024-01-05 10:00:00.1234567|2024-01-05 10:00:00,123456|2024-01-05 10:00:00\0xx
2024-01-05 24:00:00.000|2024-01-05 10:00:00.123\0xx|now|1e3|true| 5"""
TEXTS = MOMENTS.replace("\n", "|").split("|")
NUMBERS = [n + sign * k for n in (0, 10**13, 10**15, 2**53, 2**62) for k in (0, 1, 5) for sign in (1, -1)]
REALS = [0.1 + 0.2, 1.005, 1e13 + 0.01, 12345678901234.56, 9007199254740993.0, 1e16, 1e308, math.inf, -0.0, 2460000.5]
near_moments = st.builds(
    lambda text, at, char: text[:at] + char + text[at + 1 :],
    st.sampled_from(TEXTS),
    st.integers(0, 25),
    st.sampled_from("01239-:. TZ\0é"),
)


def check_scans(root: Path, values: list[object]) -> None:
    """Read each of *values* in each type: the scan gives what the tagged text gives, and fails where it does."""
    project = make_project(root)
    columns = [f"c{number}" for number in range(len(values))]
    with closing(sqlite3.connect(root / "source.db")) as source, source:
        for number, kind in enumerate(SCANNED):
            source.execute(f"CREATE TABLE t{number} ({', '.join(f'{name} {kind} COLLATE RTRIM' for name in columns)})")
            source.execute(f"INSERT INTO t{number} VALUES ({', '.join('?' * len(values))})", values)
    source = open_source(project, SETTINGS)
    with open_session(SETTINGS, extensions=source.extensions) as connection:
        source.attach(connection)

        def fetch(select: str) -> str:
            try:
                return repr(connection.execute(select).fetchall())
            except (duckdb.Error, UnicodeDecodeError):
                return "failed"

        for number, kind in enumerate(SCANNED):
            table = source.describe_table(f"t{number}")
            for column, value in zip(table.columns, values, strict=True):
                one = replace(table, columns=(column,))
                select = source.select(one)
                if "sqlite_query" not in select:
                    assert fetch(select) == fetch(source.select(replace(one, conditions=("true",)))), (kind, value)


def test_what_is_scanned_is_what_the_tagged_text_says(tmp_path: Path):
    check_scans(tmp_path, [*TEXTS, *NUMBERS, *REALS, *(text.encode() for text in TEXTS[:3]), b"2024-01-05 10:00:00"])


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(near_moments | any_integer | any_double, min_size=1, max_size=8))
def test_any_value_that_is_scanned_is_what_the_tagged_text_says(tmp_path_factory, values):
    check_scans(tmp_path_factory.mktemp("scans"), [*values, 1])


def test_the_scanner_has_the_types_that_its_values_are_checked_by(tmp_path: Path):
    columns = ", ".join(f'"{kind}" {kind}' for kind in SCANNED)
    project = make_project(tmp_path, f"CREATE TABLE t ({columns})")
    source = open_source(project, SETTINGS)

    with open_session(SETTINGS, extensions=source.extensions) as connection:
        source.attach(connection)
        described = connection.execute("DESCRIBE source.t").fetchall()
        select = source.select(source.describe_table("t"))

    assert {name: type_ for name, type_, *_ in described} == SCANNED
    assert "source.t" in select.replace('"', "")


def test_rows_and_count_are_of_one_moment(tmp_path: Path):
    project = make_project(tmp_path, "PRAGMA journal_mode = WAL; CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1)")
    source = open_source(project, SETTINGS)
    table = source.describe_table("t")

    with open_session(SETTINGS, extensions=source.extensions) as connection:
        source.attach(connection)
        source.begin(connection, table)
        assert len(connection.execute(source.select(table)).fetchall()) == 1
        with closing(sqlite3.connect(tmp_path / "source.db")) as writer, writer:
            writer.execute("INSERT INTO t VALUES (2)")

        assert source.count_rows(connection, table) == 1
        assert len(connection.execute(source.select(table)).fetchall()) == 1


def test_values_are_scanned_at_the_moment_at_which_sqlite_was_asked_about_them(tmp_path: Path):
    script = "PRAGMA journal_mode = WAL; CREATE TABLE t (d DATE); INSERT INTO t VALUES ('2024-01-05')"
    source = open_source(make_project(tmp_path, script), SETTINGS)
    table = source.describe_table("t")

    with open_session(SETTINGS, extensions=source.extensions) as connection:
        source.attach(connection)
        source.begin(connection, table)
        select = source.select(table)
        with closing(sqlite3.connect(tmp_path / "source.db")) as writer, writer:
            writer.execute("UPDATE t SET d = '2024-1-5 '")
        seen = connection.execute(select).fetchall()
        connection.execute("COMMIT")
        after = source.select(table)

    assert "sqlite_query" not in select
    assert seen == [(dt.date(2024, 1, 5),)]
    assert "sqlite_query" in after


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_all_tables_are_of_one_moment_when_a_snapshot_is_held(tmp_path: Path, journal: str):
    project = make_project(
        tmp_path,
        f"""
        PRAGMA journal_mode = {journal};
        CREATE TABLE a (n INTEGER); CREATE TABLE b (n DECIMAL(9,0));
        INSERT INTO a VALUES (60); INSERT INTO b VALUES (40);
        """,
    )
    begin_batch(project, "b1", ["a", "b"])

    with open_snapshot(project, SETTINGS, "b1") as token:
        first = extract_table(project, SETTINGS, batch="b1", table="a", snapshot=token)
        with closing(sqlite3.connect(tmp_path / "source.db")) as writer, writer:
            writer.execute("UPDATE a SET n = n - 10")
            writer.execute("UPDATE b SET n = n + 10")
        second = extract_table(project, SETTINGS, batch="b1", table="b", snapshot=token)

    with open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for m in (first, second) for path in staged_files(project, m)]
        assert connection.execute("SELECT sum(n) FROM read_parquet(?)", [files]).fetchone() == (100,)
    assert first.snapshot is not None
    assert first.snapshot == second.snapshot
    assert sorted(path.name for path in (project.staging / "b1").glob("**/*.sqlite")) == []


#: Tables in whose rowids something is odd, and by how many threads ranges of rowids of the batch's copy are read; 0:
#: it is not read so.
ROWIDS = {
    "gaps": ("CREATE TABLE t (x INTEGER)", "INSERT INTO t SELECT i FROM n; DELETE FROM t WHERE rowid % 3 = 0", 2),
    "outermost": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY)",
        f"INSERT INTO t VALUES ({-(2**63)}), (-5), (-1), (0), (1), (7), (300000), ({2**62}), ({2**63 - 1})",
        2,
    ),
    "no rows": ("CREATE TABLE t (x INTEGER)", "", 1),
    "a column rowid": (
        "CREATE TABLE t (rowid INTEGER, x INTEGER)",
        "INSERT INTO t SELECT iif(i % 2, NULL, i % 9), i FROM n",
        0,
    ),
    "without rowid": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER) WITHOUT ROWID",
        "INSERT INTO t SELECT i, i FROM n",
        0,
    ),
}


@pytest.mark.parametrize("kind", ROWIDS)
def test_every_row_of_the_copy_is_read_whatever_its_rowid(tmp_path: Path, kind: str):
    table, rows, threads = ROWIDS[kind]
    counted = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 300000) SELECT i FROM c"
    numbers = f"CREATE TABLE n AS {counted}"
    project = make_project(tmp_path, f"{numbers}; {table}; {rows};")
    _, expected = read(project, "t")
    begin_batch(project, "b1", ["t"])

    with open_snapshot(project, SETTINGS, "b1") as token:
        manifest = extract_table(project, SETTINGS, batch="b1", table="t")
        source = open_source(project, SETTINGS)
        with open_session(SETTINGS, extensions=source.extensions) as connection:
            source.attach(connection, token)
            select = source.select(source.describe_table("t"))
            used = connection.execute("SELECT current_setting('threads')").fetchone()

    assert manifest.rows == manifest.source_rows == len(expected)
    with open_session(SETTINGS, extensions=()) as connection:
        [file] = staged_files(project, manifest)
        staged = connection.execute("FROM read_parquet(?)", [str(file)]).fetchall()
    assert sorted(staged, key=repr) == sorted(expected, key=repr)
    assert ("FROM sqlite_scan(" in select) == (threads > 0)
    assert used == (max(threads, 1),)


@contextmanager
def transfers(path: Path) -> Iterator[None]:
    """Let another process move one at a time from the first row of ``a`` to its last and to ``b``, while it runs."""
    code = """
import sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
while True:
    c.execute("BEGIN IMMEDIATE")
    c.execute("UPDATE a SET n = n - 2 WHERE id = 1")
    c.execute("UPDATE a SET n = n + 1 WHERE id = 200000")
    c.execute("UPDATE b SET n = n + 1")
    c.execute("COMMIT")
    print("moved", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        reader = threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True)
        try:
            assert process.stdout.readline() == b"moved\n"
            reader.start()
            yield
        finally:
            process.kill()
            reader.join()


def test_a_sum_that_a_writer_keeps_is_intact_in_one_scan_and_over_all_tables(tmp_path: Path):
    rows = "WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < 200000) SELECT i, 10 FROM s"
    project = make_project(
        tmp_path,
        f"""
        PRAGMA journal_mode = WAL;
        CREATE TABLE a (id INTEGER PRIMARY KEY, n INTEGER); INSERT INTO a {rows};
        CREATE TABLE b (n INTEGER); INSERT INTO b VALUES (0);
        """,
    )

    with transfers(tmp_path / "source.db"):
        for number in range(3):
            batch = f"alone{number}"
            manifest = extract_table(project, SETTINGS, batch=batch, table="a")
            ends = "SELECT (SELECT n FROM r WHERE id = 1) + 2 * (SELECT n FROM r WHERE id = 200000)"
            assert query_staged(project, [manifest], ends) == (30,)
        with open_snapshot(project, SETTINGS, "b1"):
            held = [extract_table(project, SETTINGS, batch="b1", table=table) for table in ("a", "b")]

    assert query_staged(project, held, "SELECT sum(n) FROM r") == (200000 * 10,)


def query_staged(project: Project, manifests: list[Manifest], sql: str) -> tuple:
    files = [str(path) for manifest in manifests for path in staged_files(project, manifest)]
    with open_session(SETTINGS, extensions=()) as connection:
        connection.execute(f"CREATE VIEW r AS FROM read_parquet({files}, union_by_name = true)")
        return connection.execute(sql).fetchone()


def test_a_snapshot_is_kept_for_the_resume_when_the_batch_fails(tmp_path: Path):
    project = make_project(tmp_path, "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1)")
    with pytest.raises(RuntimeError), open_snapshot(project, SETTINGS, "b1"):
        raise RuntimeError
    with closing(sqlite3.connect(tmp_path / "source.db")) as writer, writer:
        writer.execute("ALTER TABLE t RENAME a TO b")
        writer.execute("INSERT INTO t VALUES (2)")

    with open_snapshot(project, SETTINGS, "b1") as token:
        manifest = extract_table(project, SETTINGS, batch="b1", table="t", snapshot=token)

    assert (manifest.rows, [column.name for column in manifest.columns]) == (1, ["a"])


def test_a_snapshot_that_is_too_old_is_given_up(tmp_path: Path):
    project = make_project(tmp_path, "CREATE TABLE t (a INTEGER)")
    copy = project.staging / "b1" / ".source" / "source.sqlite"
    with pytest.raises(RuntimeError), open_snapshot(project, SETTINGS, "b1"):
        raise RuntimeError
    two_hours_ago = copy.stat().st_mtime - 7200
    os.utime(copy, (two_hours_ago, two_hours_ago))
    strict = SETTINGS.model_copy(update={"source_snapshot_hours": 1.0})

    with (
        open_snapshot(project, strict, "b1"),
        pytest.raises(SourceUnavailable, match=r"2\.0 hours old\. Start a new batch"),
    ):
        extract_table(project, strict, batch="b1", table="t")


def test_a_missing_database_is_named_and_not_created(tmp_path: Path):
    project = make_project(tmp_path)

    problems = check_project(project, SETTINGS)

    assert [type(problem) for problem in problems] == [SourceUnavailable]
    assert f"{tmp_path}/source.db does not exist. Check [source] url" in str(problems[0])
    with pytest.raises(SourceUnavailable):
        read(project, "t")
    assert not (tmp_path / "source.db").exists()


def test_a_file_that_is_no_database_is_named(tmp_path: Path):
    project = make_project(tmp_path)
    (tmp_path / "source.db").write_text("hello " * 1000)

    with pytest.raises(SourceUnavailable, match=r"source\.db is not a SQLite database"):
        open_source(project, SETTINGS).check()


def test_a_folder_in_place_of_the_database_is_named(tmp_path: Path):
    project = make_project(tmp_path)
    (tmp_path / "source.db").mkdir()

    with pytest.raises(SourceUnavailable, match="is not a file"):
        open_source(project, SETTINGS).check()


@contextmanager
def hold_exclusively(path: Path) -> Iterator[None]:
    """Lock the database from another process: locks of one process do not stop another library in it."""
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def test_a_locked_database_is_waited_for_and_then_named(tmp_path: Path):
    project = make_project(tmp_path, "CREATE TABLE t (a INTEGER)")

    with hold_exclusively(tmp_path / "source.db"):
        with pytest.raises(SourceUnavailable, match="is locked by another program"):
            open_source(project, SETTINGS).check()
        with pytest.raises(SourceUnavailable, match="is locked by another program"):
            read(project, "t")


def test_a_lock_that_comes_between_check_and_scan_is_named_too(tmp_path: Path):
    project = make_project(tmp_path, "CREATE TABLE t (a INTEGER)")
    source = open_source(project, SETTINGS)
    table = source.describe_table("t")
    rows, keys = tmp_path / "rows.parquet", tmp_path / "keys.parquet"

    with open_session(SETTINGS, extensions=source.extensions) as connection:
        source.attach(connection)
        with (
            hold_exclusively(tmp_path / "source.db"),
            pytest.raises(SourceUnavailable, match="is locked by another program"),
        ):
            read_rows(connection, source, table, rows, None, keys=None, keys_path=keys)


def test_a_column_without_a_name_is_refused(tmp_path: Path):
    project = make_project(tmp_path, 'CREATE TABLE t ("" INTEGER)')

    with pytest.raises(SourceError, match="a column whose name is empty"):
        read(project, "t")


def test_a_table_that_differs_by_case_is_not_the_table(tmp_path: Path):
    project = make_project(tmp_path, "CREATE TABLE People (a INTEGER)")

    with pytest.raises(TableMissing, match=r'no table "people".*It has: People'):
        open_source(project, SETTINGS).describe_table("people")


def test_paths_follow_the_rule_of_sqlalchemy(tmp_path: Path):
    make_project(tmp_path, "CREATE TABLE t (a INTEGER)")
    (tmp_path / "source.db").rename(tmp_path / "odd #%41 ?name.db")

    for url in ["sqlite:///odd #%41 %3Fname.db"]:
        with pytest.raises(SourceUnavailable):
            open_source(make_project(tmp_path, url=url), SETTINGS).check()
    (tmp_path / "odd #%41 ?name.db").rename(tmp_path / "odd #%41.db")
    for url in ["sqlite:///odd #%41.db", f"sqlite:///{tmp_path}/odd #%41.db"]:
        assert open_source(make_project(tmp_path, url=url), SETTINGS).list_tables() == ["t"]


@pytest.mark.parametrize("url", ["sqlite:", "sqlite://", "sqlite:///", "sqlite://host/path.db"])
def test_a_url_without_a_file_is_refused(tmp_path: Path, url: str):
    with pytest.raises(ProjectError, match=r"names no file or folder\..*Write sqlite:///relative"):
        open_source(make_project(tmp_path, url=url), SETTINGS)


def test_every_problem_of_the_contract_is_reported_at_once(tmp_path: Path):
    project = make_project(
        tmp_path,
        "CREATE TABLE a (n INTEGER, x TEXT); CREATE TABLE b (n INTEGER)",
        """
        [table.a]
        key = ["id"]
        columns = { n = "BIGINT", x = "BIGINT", y = "VARCHAR" }
        [table.gone]
        """,
    )

    problems = check_project(project, SETTINGS)

    assert [type(problem) for problem in problems] == [SchemaDrift, TableMissing]
    assert str(problems[0]) == (
        'Table "a" does not fit its contract: the column "x" is TEXT in the source, VARCHAR in the warehouse, '
        "not BIGINT; "
        'the column "y" is missing; the key column "id" is missing. '
        'Change the source, or the section [table."a"] of phasewise.toml.'
    )
    assert '"gone"' in str(problems[1])


def test_texts_are_checked_when_the_contract_makes_them_moments_or_uuids(tmp_path: Path):
    more = '[table.t.columns]\nd = "DATE"\nt = "timestamptz"\nu = "UUID"\n'
    value = uuid.uuid4()
    row = f"'2024-01-02', '2024-01-02T03:04:05+02', '{value}'"
    script = f"CREATE TABLE t (d TEXT, t TEXT, u TEXT); INSERT INTO t VALUES ({row})"
    project = make_project(tmp_path, script, more)

    types, rows = read(project, "t")

    assert types == ["DATE", "TIMESTAMP WITH TIME ZONE", "UUID"]
    assert rows == [(dt.date(2024, 1, 2), dt.datetime(2024, 1, 2, 1, 4, 5, tzinfo=dt.UTC), value)]
