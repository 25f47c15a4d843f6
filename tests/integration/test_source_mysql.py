"""MySQL and MariaDB: every value arrives as it was, or the extraction says where not."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from phasewise import lake, staging
from phasewise.errors import ProjectError, SchemaDrift, SourceUnavailable, TableMissing, UnfaithfulValue
from phasewise.project import Project, load_project
from phasewise.settings import Settings
from phasewise.source_contract import PASSWORD, ROWS, SourceContract
from phasewise.sources import check_project, list_project_tables, open_source

SETTINGS = Settings(threads=2, memory_limit="512MB", connect_timeout=2)
HOST = os.environ.get("MYSQL_HOST", "127.0.0.1")


def mariadb(sql: str, database: str = "") -> str:
    command = ["mariadb", "-h", HOST, "-u", "root", "--default-character-set=utf8mb4", "-N", database]
    environment = {name: value for name, value in os.environ.items() if name != "MYSQL_PWD"}
    done = subprocess.run(command, input=sql, text=True, capture_output=True, check=True, env=environment)
    return done.stdout


def is_reachable() -> bool:
    try:
        return mariadb("SELECT 1").strip() == "1"
    except (OSError, subprocess.CalledProcessError):
        return False


pytestmark = pytest.mark.skipif(not is_reachable(), reason=f"no MariaDB with a free root on {HOST}:3306")

Make = Callable[..., Project]


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    lake.preload_extensions(("mysql_scanner",))


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"pw_{uuid.uuid4().hex[:10]}"
    mariadb(
        f"CREATE DATABASE {name} CHARACTER SET utf8mb4; CREATE USER {name}@'%' IDENTIFIED BY 'a secret/:@';"
        f"GRANT SELECT, SHOW VIEW ON {name}.* TO {name}@'%'"
    )
    monkeypatch.delenv("MYSQL_PWD", raising=False)
    yield name
    mariadb(f"DROP DATABASE {name}; DROP USER {name}@'%'")


@pytest.fixture
def make(tmp_path: Path, database: str) -> Make:
    def make_project(script: str = "", more: str = "") -> Project:
        if script:
            mariadb(f"SET sql_mode = 'ALLOW_INVALID_DATES'; {script}", database)
        url = f"mysql://{database}:a%20secret%2F%3A%40@{HOST}:3306/{database}"
        (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
        return load_project(tmp_path)

    return make_project


def read(project: Project, table: str) -> tuple[list[str], list[tuple]]:
    manifest = staging.extract_table(project, SETTINGS, batch=staging.new_batch_id(), table=table)
    assert manifest.rows == manifest.source_rows
    with lake.open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for path in staging.staged_files(project, manifest)]
        result = connection.execute("FROM read_parquet(?) ORDER BY 1", [files])
        assert [str(column[1]) for column in result.description] == [column.type for column in manifest.columns]
        return [column.type for column in manifest.columns], result.fetchall()


def test_values_arrive_as_they_are(make: Make):
    big = "12345678901234567890123456789012345.123456789012345678901234567890"
    columns = {
        "id int primary key": (1, 1, "INTEGER"),
        "t tinyint(1)": (5, 5, "TINYINT"),
        "ub bigint unsigned": (2**64 - 1, 2**64 - 1, "UBIGINT"),
        "ui int(5) unsigned zerofill": (42, 42, "UINTEGER"),
        "m mediumint": (-8388608, -8388608, "INTEGER"),
        "d decimal(38,10)": ("-1.5", Decimal("-1.5"), "DECIMAL(38,10)"),
        "d65 decimal(65,30)": (f"'{big}'", big, "VARCHAR"),
        "f float": (0.1, 0.10000000149011612, "FLOAT"),
        "db double": (1e300, 1e300, "DOUBLE"),
        "b1 bit(1)": ("b'1'", True, "BOOLEAN"),
        "b9 bit(9)": ("b'100000001'", b"\x01\x01", "BLOB"),
        "y year": (1901, 1901, "INTEGER"),
        "day date": ("'2024-02-29'", dt.date(2024, 2, 29), "DATE"),
        "at datetime(6)": ("'9999-12-31 23:59:59.999999'", dt.datetime(9999, 12, 31, 23, 59, 59, 999999), "TIMESTAMP"),
        "ts timestamp null": (
            "'2024-01-01 00:00:00'", dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "TIMESTAMP WITH TIME ZONE"
        ),
        "clock time(2)": ("'-838:59:59'", "-838:59:59.00", "VARCHAR"),
        "x text": ("'é😀'", "é😀", "VARCHAR"),
        "e varchar(3)": ("''", "", "VARCHAR"),
        "l varchar(9) character set latin1": ("'é'", "é", "VARCHAR"),
        "raw blob": ("x'00ff'", b"\x00\xff", "BLOB"),
        "bin binary(3)": ("x'01'", b"\x01\x00\x00", "BLOB"),
        "mood enum('sad','glad')": ("'glad'", "glad", "VARCHAR"),
        "tags set('x','y')": ("'x,y'", "x,y", "VARCHAR"),
        "j json": ("'{\"a\":  1}'", '{"a":  1}', "VARCHAR"),
    }  # fmt: skip
    nulls = ", ".join(["2", *["NULL"] * (len(columns) - 1)])
    script = f"SET time_zone = '+00:00'; CREATE TABLE t ({', '.join(columns)}, g int AS (id * 2)); INSERT INTO t ("
    script += ", ".join(name.split()[0] for name in columns)
    script += f") VALUES ({', '.join(str(value) for value, _, _ in columns.values())}), ({nulls})"
    project = make(script)

    types, rows = read(project, "t")

    assert types == [*[kind for _, _, kind in columns.values()], "INTEGER"]
    assert rows == [
        (*[expected for _, expected, _ in columns.values()], 2),
        (2, *[None] * (len(columns) - 1), 4),
    ]


@pytest.mark.parametrize(
    ("declared", "value"),
    [("date", "0000-00-00"), ("date", "2024-02-31"), ("datetime", "0000-00-00 00:00:00"), ("date", "2024-00-01")],
)
def test_a_date_that_is_none_fails_with_its_row(make: Make, declared: str, value: str):
    project = make(f"""
        CREATE TABLE t (id int PRIMARY KEY, `the column` {declared});
        INSERT INTO t VALUES (1, NULL), (77, '{value}');
    """)

    with pytest.raises(UnfaithfulValue, match=rf'"the column" .*1 row.*\(id = 77\) is {value}.*"VARCHAR"'):
        read(project, "t")


def test_a_contract_carries_as_text_or_as_boolean(make: Make):
    more = '[table.t.columns]\nd = "VARCHAR"\nb = "BOOLEAN"\nf = "VARCHAR"\n'
    script = "CREATE TABLE t (id int, d date, b tinyint(1), f float); INSERT INTO t VALUES (1, '0000-00-00', 1, 0.1)"
    project = make(script, more)
    assert read(project, "t")[1] == [(1, "0000-00-00", True, "0.1")]

    make("UPDATE t SET b = 2", more)
    with pytest.raises(UnfaithfulValue, match='"b"'):
        read(project, "t")


def test_hard_names_arrive(make: Make):
    project = make("""
        CREATE TABLE `a``b 'c" d` (`x``y` int, `select` int, `a b` date, `ü` int, `q"q` int, `b\\\\s` int);
        INSERT INTO `a``b 'c" d` VALUES (1, 2, '2024-01-01', 4, 5, 6);
    """)

    assert read(project, "a`b 'c\" d")[1] == [(1, 2, dt.date(2024, 1, 1), 4, 5, 6)]


def test_tables_that_differ_by_case_are_told_apart_or_refused(make: Make):
    script = "CREATE TABLE People (a int); INSERT INTO People VALUES (1); CREATE TABLE people (b int)"
    project = make(script)
    with pytest.raises(ProjectError, match='"People" and "people" differ by case only'):
        list_project_tables(project, open_source(project, SETTINGS))

    project = make(more='[tables]\nexclude = ["people"]\n')

    assert check_project(project, SETTINGS) == []
    assert read(project, "People") == (["INTEGER"], [(1,)])


def test_views_are_extracted_when_named_and_problems_found(make: Make):
    project = make(
        "CREATE TABLE t (id int); CREATE VIEW v AS SELECT 1 AS one",
        '[tables]\ninclude = ["t", "v"]\n[table.t.columns]\nid = "BIGINT"\n[table.gone]\n',
    )

    assert [type(problem) for problem in check_project(project, SETTINGS)] == [TableMissing, SchemaDrift]
    assert read(project, "v")[1] == [(1,)]


def test_a_table_is_not_claimed_to_be_consistent_with_others(make: Make):
    project = make("CREATE TABLE t (id int)")

    with staging.open_snapshot(project, SETTINGS, "b1") as token:
        manifest = staging.extract_table(project, SETTINGS, batch="b1", table="t", snapshot=token)

    assert token is None
    assert manifest.snapshot is None


@pytest.mark.parametrize("change", ["port", "password", "database"])
def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path, database: str, change: str):
    password = "topsecret" if change == "password" else "a%20secret%2F%3A%40"
    port = 1 if change == "port" else 3306
    name = "no_such" if change == "database" else database
    url = f"mysql://{database}:{password}@{HOST}:{port}/{name}"
    (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n')

    with pytest.raises(SourceUnavailable, match=r"does not answer: ") as caught:
        open_source(load_project(tmp_path), SETTINGS).check()

    error: BaseException | None = caught.value
    while error is not None:
        assert "topsecret" not in str(error)
        assert "a secret" not in str(error)
        assert "a%20secret" not in str(error)
        error = error.__cause__


class TestMysqlContract(SourceContract):
    holds_snapshots = False

    @pytest.fixture(autouse=True)
    def _database(self, database: str):
        mariadb(f"SET PASSWORD FOR {database}@'%' = PASSWORD('{PASSWORD}')")
        self.database = database

    def make_url(self, tmp_path: Path) -> str:
        texts = (
            "NULL" if label is None else "'" + label.replace("\\", "\\\\").replace("'", "''") + "'" for _, label in ROWS
        )
        values = ", ".join(f"({number}, {text})" for (number, _), text in zip(ROWS, texts, strict=True))
        mariadb(
            f"CREATE TABLE contract (id bigint PRIMARY KEY, label text); INSERT INTO contract VALUES {values};"
            "CREATE TABLE contract_empty (id bigint PRIMARY KEY, label text)",
            self.database,
        )
        return f"mysql://{self.database}:{PASSWORD}@{HOST}:3306/{self.database}"
