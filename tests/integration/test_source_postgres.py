"""PostgreSQL: every value arrives as it was, in one moment for all processes, or the extraction says where not."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from phasewise.errors import ProjectError, SchemaDrift, SourceError, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.lake.publications import open_reader
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.sources import check_project, list_project_tables, open_source
from phasewise.staging.batch import begin_batch, new_batch_id
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import list_manifests, staged_files
from phasewise.staging.source_snapshot import open_snapshot
from phasewise.testing.projects import publish_sample
from phasewise.testing.source_contract import PASSWORD, ROWS, SourceContract
from tests.servers import find_postgres, postgres_database, psql, psql_command
from tests.staged import read_manifest

SETTINGS = Settings(threads=2, memory_limit="512MB", connect_timeout=2)
POSTGRES = find_postgres()


pytestmark = POSTGRES.needed()

Make = Callable[..., Project]


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("postgres_scanner", "ducklake", "sqlite_scanner"))


@pytest.fixture
def schema() -> Iterator[str]:
    name = f"pw_{uuid.uuid4().hex[:10]}"
    psql(f"CREATE SCHEMA {name}")
    yield name
    psql(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def make(tmp_path: Path, schema: str) -> Make:
    def make_project(script: str = "", more: str = "") -> Project:
        if script:
            psql(script, schema)
        url = f"postgresql://postgres:a%20secret@{POSTGRES}/test?schema={schema}"
        (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
        return load_project(tmp_path)

    return make_project


def read(project: Project, table: str, batch: str | None = None) -> tuple[list[str], list[tuple]]:
    manifest = extract_table(project, SETTINGS, batch=batch or new_batch_id(), table=table)
    assert manifest.rows == manifest.source_rows
    with open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for path in staged_files(project, manifest)]
        result = connection.execute("FROM read_parquet(?) ORDER BY 1", [files])
        assert [str(column[1]) for column in result.description] == [column.type for column in manifest.columns]
        return [column.type for column in manifest.columns], result.fetchall()


#: Encodings of databases, and a text that each of them has in other bytes than UTF-8.
ENCODINGS = {"LATIN1": "é ü ß", "WIN1252": "é € œ", "EUC_JP": "日本 カナ", "UTF8": "é € 日本 🙂"}


@pytest.mark.parametrize("client", [None, "LATIN1"])
@pytest.mark.parametrize("options", ["", "?client_encoding=LATIN1&options=-c%20client_encoding%3DLATIN1"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_of_a_database_arrive_whatever_encoding_it_has_and_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, options: str, client: str | None
):
    text = ENCODINGS[encoding]
    with postgres_database(encoding) as database:
        script = f"""SET client_encoding = 'UTF8'; CREATE TABLE "{text}" (id int PRIMARY KEY, "{text}" text, j json);
            INSERT INTO "{text}" VALUES (1, '{text}', '["{text}"]');
            CREATE VIEW v AS SELECT * FROM "{text}" WHERE "{text}" = '{text}'"""
        subprocess.run([*psql_command(), "-d", database], input=script, text=True, check=True, capture_output=True)
        url = f"postgresql://postgres@{POSTGRES}/{database}{options}"
        (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n')
        project = load_project(tmp_path)
        if client is not None:
            monkeypatch.setenv("PGCLIENTENCODING", client)

        with open_snapshot(project, SETTINGS, "b1"):
            assert read(project, text, "b1")[1] == [(1, text, f'["{text}"]')]
        assert read(project, "v")[1] == [(1, text, f'["{text}"]')]
        source = open_source(project, SETTINGS)
        assert source.list_tables() == [text]
        assert [column.name for column in source.describe_table(text).columns] == ["id", text, "j"]


def test_plain_types_arrive_as_they_are(make: Make):
    project = make("""
        CREATE TABLE t (id int2 PRIMARY KEY, a int4, b int8, c float4, d float8, e bool, f text, g varchar(9),
            h char(5), u uuid, y bytea, n numeric(38, 5), day date, at timestamp, tz timestamptz, clock time);
        INSERT INTO t VALUES
            (1, 2147483647, -9223372036854775808, 'NaN', '-Infinity', true, '', 'a', 'x',
             'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '\\x00ff', '-123456789012345678901234567890123.45678',
             '2024-02-29', '1999-12-31 23:59:59.999999', '2024-01-01 00:00:00+02', '24:00:00'),
            (2, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
    """)

    _, rows = read(project, "t")

    assert math.isnan(rows[0][3])
    assert rows[0][:3] == (1, 2147483647, -(2**63))
    assert rows[0][4:11] == (
        -math.inf, True, "", "a", "x", uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"), b"\x00\xff"
    )  # fmt: skip
    assert rows[0][11:15] == (
        Decimal("-123456789012345678901234567890123.45678"),
        dt.date(2024, 2, 29),
        dt.datetime(1999, 12, 31, 23, 59, 59, 999999),
        dt.datetime(2023, 12, 31, 22, tzinfo=dt.UTC),
    )
    assert str(rows[0][15]) == "24:00:00"
    assert rows[1] == (2, *[None] * 15)


def test_dates_before_christ_and_infinity_arrive(make: Make):
    project = make("""
        CREATE TABLE t (id int, d date, ts timestamp, tz timestamptz);
        INSERT INTO t VALUES (1, 'infinity', '-infinity', 'infinity'),
            (2, '0044-03-15 BC', '4713-01-01 00:00:00 BC', '294246-12-31 23:59:59+00');
    """)
    manifest = extract_table(project, SETTINGS, batch="b", table="t")

    with open_session(SETTINGS, extensions=()) as connection:
        file = str(staged_files(project, manifest)[0])
        rows = connection.execute(
            "SELECT d::VARCHAR, ts::VARCHAR, tz::VARCHAR FROM read_parquet(?) ORDER BY id", [file]
        ).fetchall()

    assert rows == [
        ("infinity", "-infinity", "infinity"),
        ("0044-03-15 (BC)", "4713-01-01 (BC) 00:00:00", "294246-12-31 23:59:59+00"),
    ]


@pytest.mark.parametrize(
    ("declared", "value"),
    [("numeric(10, 2)", "NaN"), ("timestamp", "294276-12-31 23:59:59"), ("timestamptz", "294270-01-01 00:00:00+00")],
)
def test_a_value_that_the_scan_would_change_fails_with_its_row(make: Make, declared: str, value: str):
    project = make(f"""
        CREATE TABLE t (id int PRIMARY KEY, "the column" {declared});
        INSERT INTO t VALUES (1, NULL), (77, '{value}');
    """)

    with pytest.raises(UnfaithfulValue, match=rf'"the column" .*1 row.*\(id = 77\) is {value[:8]}.*"VARCHAR"'):
        read(project, "t")
    assert not list(project.staging.glob("**/*.parquet"))


@pytest.mark.parametrize(
    ("declared", "usual", "value"),
    [
        ("numeric(10, 2)", "1 + n % 9", "NaN"),
        ("numeric(4, 2)", "-0.01 - n % 9", "NaN"),
        ("numeric(38, 38)", "1e-38", "NaN"),
        ("timestamp", "timestamp '2020-01-01' + n * interval '1 s'", "294247-01-10 04:00:54.775808"),
        ("timestamp", "timestamp 'infinity'", "294276-12-31 23:59:59.999999"),
        ("timestamptz", "timestamptz '4713-11-24 00:00:00+00 BC'", "294247-06-01 00:00:00+00"),
    ],
)
def test_one_such_value_is_found_among_row_groups_of_others(make: Make, declared: str, usual: str, value: str):
    project = make(f"""
        CREATE TABLE t (id int PRIMARY KEY, usual {declared}, odd {declared}, nothing {declared});
        INSERT INTO t SELECT n, {usual}, {usual} FROM generate_series(1, 130000) AS n;
        UPDATE t SET odd = '{value}' WHERE id = 129999;
    """)

    with pytest.raises(UnfaithfulValue, match=r'"odd" .*1 row.*\(id = 129999\)'):
        read(project, "t")

    make("UPDATE t SET odd = NULL WHERE id = 129999")
    assert len(read(project, "t")[1]) == 130_000


def test_types_without_a_faithful_counterpart_are_carried_as_text_and_say_so(make: Make):
    values = {
        "numeric": ["NaN", "Infinity", "-Infinity", "1e-30", "12345678901234567890123456789012345678901234567890.5"],
        "numeric(50, 10)": ["1.1"],
        "numeric(5, -2)": ["12300"],
        "interval": ["-1 days", "178000000 years"],
        "timetz": ["10:00:00+05"],
        "int[]": ["{{1,2},{3,4}}", "{1,NULL}", "{}"],
        "mood": ["sad"],
        "money": ["-$1,234.50"],
        "bit(3)": ["101"],
        "inet": ["10.0.0.0/8"],
        "int4range": ["[1,5)"],
        "pair": ['(1,"a b")'],
        "point": ["(1,2)"],
        "tsvector": ["'a' 'b'"],
        "oid": ["4294967295"],
        '"char"': ["c"],
    }
    columns = ", ".join(f"c{index} {kind}" for index, kind in enumerate(values))
    height = max(map(len, values.values()))
    rows = [[texts[row] if row < len(texts) else None for texts in values.values()] for row in range(height)]
    literals = ", ".join(
        "(" + ", ".join([str(n), *("NULL" if v is None else quote_literal(v) for v in row)]) + ")"
        for n, row in enumerate(rows)
    )
    project = make(f"""
        CREATE TYPE mood AS ENUM ('happy', 'sad'); CREATE TYPE pair AS (a int, b text);
        CREATE TABLE t (id int, {columns}); INSERT INTO t VALUES {literals};
    """)

    types, got = read(project, "t")

    assert types == ["INTEGER"] + ["VARCHAR"] * len(values)
    expected = [[v and {"1e-30": "0." + "0" * 29 + "1", "1.1": "1.1000000000"}.get(v, v) for v in row] for row in rows]
    assert [list(row[1:]) for row in got] == expected
    notes = [column.note for column in open_source(project, SETTINGS).describe_table("t").columns]
    assert notes[0] is None
    assert all(note.startswith("carried as text") for note in notes[1:])


def test_json_and_domains_arrive(make: Make):
    project = make("""
        CREATE DOMAIN small AS int CHECK (value < 10); CREATE DOMAIN price AS numeric(9, 2);
        CREATE TABLE t (id int, s small, p price, j json, b jsonb);
        INSERT INTO t VALUES (1, 3, 1.25, '{"a":  1}', '{"a":  1}');
    """)

    types, rows = read(project, "t")

    assert types == ["INTEGER", "INTEGER", "DECIMAL(9,2)", "VARCHAR", "VARCHAR"]
    assert rows == [(1, 3, Decimal("1.25"), '{"a":  1}', '{"a": 1}')]


def test_rare_declarations_arrive(make: Make):
    project = make("""
        CREATE DOMAIN whole AS int; CREATE DOMAIN small AS whole CHECK (value < 10); CREATE DOMAIN many AS int[];
        CREATE TYPE pair AS (a int, b text); CREATE TABLE typed OF pair; INSERT INTO typed VALUES (1, 'x');
        CREATE TABLE t (id int, gone int, s small, n numeric(3, 5), f float4, m many, v bit varying, i interval(0),
            g int GENERATED ALWAYS AS (id * 2) STORED, l pg_lsn, p int4multirange, x text COLLATE "C");
        INSERT INTO t VALUES (1, 7, 3, 0.00123, 3.4028235e38, '{1}', '101', '1 mon -1 day', DEFAULT, '16/B374D848',
            '{[1,3),[5,7)}', E'\\u0001');
        ALTER TABLE t DROP COLUMN gone; ALTER TABLE t ADD COLUMN late int DEFAULT 4;
        CREATE TABLE plain (a int, gone text, b text); INSERT INTO plain VALUES (1, 'g', 'b');
        ALTER TABLE plain DROP COLUMN gone; ALTER TABLE plain ADD COLUMN late text DEFAULT 'late';
    """)

    assert read(project, "plain")[1] == [(1, "b", "late")]
    assert read(project, "typed")[1] == [(1, "x")]
    assert read(project, "t")[1] == [
        (1, "3", "0.00123", 3.4028234663852886e38, "{1}", "101", "1 mon -1 days", 2, "16/B374D848", "{[1,3),[5,7)}",
         "\1", 4)
    ]  # fmt: skip


def test_a_contract_gives_a_free_numeric_a_checked_decimal(make: Make):
    more = '[table.t.columns]\nn = "DECIMAL(6,2)"\n'
    project = make("CREATE TABLE t (id int PRIMARY KEY, n numeric); INSERT INTO t VALUES (1, 1.5), (2, NULL)", more)
    assert read(project, "t") == (["INTEGER", "DECIMAL(6,2)"], [(1, Decimal("1.50")), (2, None)])

    for value in ("'NaN'", "1.005", "10000"):
        make(f"UPDATE t SET n = {value} WHERE id = 2", more)
        with pytest.raises(UnfaithfulValue, match=r"id = 2"):
            read(project, "t")


def test_only_real_tables_are_listed_and_views_when_named(make: Make):
    project = make(
        """
        CREATE TABLE t (id int); CREATE VIEW v AS SELECT 1 AS one; CREATE MATERIALIZED VIEW m AS SELECT 2 AS two;
        CREATE TABLE p (id int, x text) PARTITION BY RANGE (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (5);
        CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (5) TO (9); INSERT INTO p VALUES (1, 'a'), (7, 'b');
        CREATE TABLE child () INHERITS (t); INSERT INTO t VALUES (1); INSERT INTO child VALUES (2);
        """,
        '[tables]\ninclude = ["*", "m"]\n[table.v]\n',
    )

    assert list_project_tables(project, open_source(project, SETTINGS)) == ["child", "m", "p", "t", "v"]
    assert read(project, "p")[1] == [(1, "a"), (7, "b")]
    assert read(project, "t")[1] == [(1,), (2,)]
    assert read(project, "v")[1] == [(1,)]
    assert read(project, "m")[1] == [(2,)]


def test_odd_values_are_found_again_in_the_published_lake(make: Make):
    project = make("""
        CREATE TABLE t (id int, d date, ts timestamp, tz timestamptz, f float8, x text, e text, raw bytea);
        INSERT INTO t VALUES
            (1, 'infinity', 'infinity', '-infinity', 'NaN', repeat('é', 2097152), '',
             decode(repeat('00ff', 2097152), 'hex')),
            (2, '-infinity', '-infinity', 'infinity', '-Infinity', 'x', NULL, ''),
            (3, '0044-03-15 BC', '4713-01-01 BC', '4713-01-02 00:00+00 BC', 1.5, NULL, ' ', NULL),
            (4, '5874897-12-31', '294246-12-31 23:59:59.999999', '294246-12-31 23:59:59.999999+00', '1e-300', '',
             'e', '');
    """)
    begin_batch(project, "b1", ["t"])
    extract_table(project, SETTINGS, batch="b1", table="t")

    publish_sample(project, SETTINGS, "b1")

    found = {
        "d = 'infinity'": [1],
        "d < DATE '0001-01-01'": [2, 3],
        "d = DATE '5874897-12-31'": [4],
        "ts = 'infinity'": [1],
        "ts < TIMESTAMP '0001-01-01'": [2, 3],
        "ts > TIMESTAMP '2000-01-01'": [1, 4],
        "tz = '-infinity'": [1],
        "tz = 'infinity'": [2],
        "isnan(f)": [1],
        "f > 1e308": [1],
        "f = '-Infinity'": [2],
        "f = 1e-300": [4],
        "e = ''": [1],
        "e IS NULL": [2],
        "x = repeat('é', 2097152)": [1],
        "octet_length(raw) = 4194304 AND md5(raw) = md5(unhex(repeat('00ff', 2097152)))": [1],
        "octet_length(raw) = 0": [2, 4],
    }
    with open_reader(project, SETTINGS) as connection:
        got = {
            condition: [
                row[0] for row in connection.execute(f"SELECT id FROM t WHERE {condition} ORDER BY id").fetchall()
            ]
            for condition in found
        }
    assert got == found


@pytest.mark.parametrize("other", ["text", "money"])  # scanned, and printed by the server
def test_hard_names_arrive(make: Make, other: str):
    names = ['a"b', "select", "a b", "😀", "a'b", "ctid2", "$1", "ß", "UPPER", "a\\b"]
    kinds = ["text", other] * 5
    columns = ", ".join(f"{quote_identifier(name)} {kind}" for name, kind in zip(names, kinds, strict=True))
    project = make(f"""CREATE TABLE "O'dd ""t\\" ({columns}); INSERT INTO "O'dd ""t\\" ("a b") VALUES ('x')""")

    assert read(project, "O'dd \"t\\")[1] == [(None, None, "x", *[None] * 7)]


def test_a_table_may_have_1600_columns(make: Make):
    many = ", ".join(f"c{index} int DEFAULT {index}" for index in range(1600))
    project = make(f"CREATE TABLE many ({many}); INSERT INTO many DEFAULT VALUES")

    assert read(project, "many")[1] == [tuple(range(1600))]


def test_what_the_lake_cannot_hold_is_refused_by_name(make: Make):
    project = make('CREATE TABLE z (); CREATE TABLE c ("A" int, a int); CREATE TABLE e (id int)')

    assert [str(problem).partition(" of ")[0] for problem in check_project(project, SETTINGS)] == [
        'Table "c"',
        'Table "z"',
    ]
    with pytest.raises(SourceError, match="has no columns"):
        read(project, "z")
    with pytest.raises(SourceError, match=r"differ by case only \(A, a\)"):
        read(project, "c")
    assert read(project, "e")[1] == []


def test_drift_and_missing_tables_are_found(make: Make):
    project = make("CREATE TABLE t (id int)", '[table.t.columns]\nid = "BIGINT"\n[table.gone]\n')

    problems = check_project(project, SETTINGS)

    assert [type(problem) for problem in problems] == [TableMissing, SchemaDrift]


def test_all_processes_read_at_the_snapshot_that_is_held(make: Make, schema: str):
    project = make("""
        CREATE TABLE a (n bigint); INSERT INTO a SELECT 1 FROM generate_series(1, 300000);
        CREATE TABLE b (n numeric); INSERT INTO b VALUES (0);
    """)
    code = textwrap.dedent("""
        import json, sys
        from pathlib import Path
        from phasewise.staging.extract import extract_table
        from phasewise.project.config import load_project
        from phasewise.settings import Settings
        extract_table(load_project(Path(sys.argv[1])), Settings(), batch="b1", table=sys.argv[2],
            snapshot=json.loads(sys.argv[3]))
    """)
    with open_snapshot(project, SETTINGS, "b1") as token:
        psql(
            "BEGIN; DELETE FROM a WHERE ctid IN (SELECT ctid FROM a LIMIT 100000); UPDATE b SET n = n + 100000; COMMIT",
            schema,
        )
        for table in ("a", "b"):
            command = [sys.executable, "-c", code, str(project.root), table, json.dumps(dict(token))]
            subprocess.run(command, check=True, timeout=50)

    first, second = (read_manifest(project, "b1", table) for table in ("a", "b"))
    assert first.rows == first.source_rows == 300000
    assert first.snapshot == second.snapshot is not None
    with open_session(SETTINGS, extensions=()) as connection:
        file = str(staged_files(project, second)[0])
        assert connection.execute("FROM read_parquet(?)", [file]).fetchall() == [("0",)]


def test_a_sum_that_a_writer_keeps_is_intact_in_the_lake(make: Make, schema: str):
    # Several row groups of pages each, so that both threads of a scan have something to read.
    project = make("""
        CREATE TABLE a (id int PRIMARY KEY, n bigint, pad text); CREATE TABLE b (LIKE a INCLUDING ALL);
        CREATE TABLE c (id int PRIMARY KEY, n numeric);
        INSERT INTO a SELECT i, 10, repeat('x', 300) FROM generate_series(1, 60000) i; INSERT INTO b TABLE a;
        INSERT INTO c SELECT i, 10 FROM generate_series(1, 60000) i; ANALYZE;
    """)
    begin_batch(project, "b1", ["a", "b", "c"])

    with transfers(schema) as count_done:
        wait_for_more(count_done)
        with open_snapshot(project, SETTINGS, "b1"):
            for table in ("a", "b", "c"):
                extract_table(project, SETTINGS, batch="b1", table=table)
                wait_for_more(count_done)
    publish_sample(project, SETTINGS, "b1")

    with open_reader(project, SETTINGS) as connection:
        sums = connection.execute(
            "SELECT (SELECT sum(n) FROM a) + (SELECT sum(n) FROM b) + (SELECT sum(n::INT) FROM c)"
        )
        assert sums.fetchone() == (3 * 60000 * 10,)
    assert len({manifest.snapshot for manifest in list_manifests(project, "b1")}) == 1


@contextmanager
def transfers(schema: str) -> Iterator[Callable[[], int]]:
    """Move one at a time from table to table, in a transaction each, while the block runs; yield how often so far."""
    psql("CREATE SEQUENCE done", schema)
    move = """
        DO $$ BEGIN LOOP
            UPDATE a SET n = n - 1 WHERE id = 7; UPDATE b SET n = n - 1 WHERE id = 50000;
            UPDATE c SET n = n + 2 WHERE id = 7;
            PERFORM nextval('done'); COMMIT;
        END LOOP; END $$;
    """
    command = [*psql_command(), "-c", move]
    environment = {**os.environ, "PGOPTIONS": f"-c search_path={schema}", "PGAPPNAME": schema}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as writer:
        try:
            yield lambda: int(psql("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM done", schema))
        finally:
            psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{schema}'")
            writer.wait(timeout=20)


def wait_for_more(count_done: Callable[[], int]) -> None:
    before, deadline = count_done(), time.monotonic() + 20
    while count_done() < before + 3:
        assert time.monotonic() < deadline, "the writer is stuck"
        time.sleep(0.02)


def test_a_snapshot_whose_holder_has_gone_is_an_error(make: Make):
    project = make("CREATE TABLE t (id int)")
    with open_snapshot(project, SETTINGS, "b1") as token:
        pass

    with pytest.raises(SourceUnavailable, match="cannot be entered"):
        extract_table(project, SETTINGS, batch="b1", table="t", snapshot=token)


def test_a_snapshot_is_given_up_when_it_is_held_for_too_long(make: Make):
    project = make("CREATE TABLE t (id int)")
    settings = SETTINGS.model_copy(update={"source_snapshot_hours": 0.5 / 3600})

    with open_snapshot(project, settings, "b1") as token:
        deadline = time.monotonic() + 20
        while is_held(token["id"]):
            assert time.monotonic() < deadline, "the server still holds the snapshot"
            time.sleep(0.1)
        with pytest.raises(SourceUnavailable, match=r"hours old\. Start a new batch"):
            extract_table(project, settings, batch="b1", table="t")
        with pytest.raises(SourceUnavailable, match="cannot be entered"):
            extract_table(project, SETTINGS, batch="b2", table="t", snapshot=token)


def is_held(snapshot: str) -> bool:
    try:
        psql(f"BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{snapshot}'; COMMIT")
    except subprocess.CalledProcessError:
        return False
    return True


@pytest.mark.parametrize("change", ["port", "user", "database", "host"])
def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path, change: str):
    user, host, port, database = "postgres", POSTGRES.host, str(POSTGRES.port), "test"
    if change == "port":
        port = "1"
    elif change == "user":
        user = "nobody_here"
    elif change == "database":
        database = "no_such"
    else:
        host = "no-such-host.invalid"
    url = f"postgresql://{user}:topsecret@{host}:{port}/{database}"
    (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n')
    project = load_project(tmp_path)

    with pytest.raises(SourceUnavailable, match=r"does not answer: ") as caught:
        open_source(project, SETTINGS).check()

    error: BaseException | None = caught.value
    while error is not None:
        assert "topsecret" not in str(error)
        error = error.__cause__
    assert "topsecret" not in repr(project)


def test_a_url_without_a_database_is_refused(tmp_path: Path):
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "postgresql://u:p@h"\n')

    with pytest.raises(ProjectError, match=r'"postgresql://u:\*\*\*@h" names no database'):
        open_source(load_project(tmp_path), SETTINGS)


def literals(rows: list[tuple[int, str | None]]) -> str:
    quoted = ((number, "NULL" if label is None else quote_literal(label)) for number, label in rows)
    return ", ".join(f"({number}, {label})" for number, label in quoted)


class TestPostgresContract(SourceContract):
    @pytest.fixture(autouse=True)
    def _schema(self, schema: str):
        self.schema = schema

    def make_url(self, tmp_path: Path) -> str:
        psql(
            f"CREATE TABLE contract (id bigint PRIMARY KEY, label text); INSERT INTO contract VALUES {literals(ROWS)};"
            "CREATE TABLE contract_empty (id bigint PRIMARY KEY, label text)",
            self.schema,
        )
        return f"postgresql://postgres:{PASSWORD}@{POSTGRES}/test?schema={self.schema}"
