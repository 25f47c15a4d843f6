"""MySQL and MariaDB: every value arrives as it was, or the extraction says where not."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path

import pymysql
import pytest
from pymysql.constants import COMMAND

from phasewise.errors import ProjectError, SchemaDrift, SourceUnavailable, StagingError, TableMissing, UnfaithfulValue
from phasewise.lake.publications import open_reader
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.sources import check_project, list_project_tables, mysql_snapshot, open_source, protocol
from phasewise.staging.batch import begin_batch, new_batch_id
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, list_manifests, staged_files
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.source_snapshot import open_snapshot
from phasewise.testing.projects import publish_sample
from phasewise.testing.source_contract import PASSWORD, ROWS, SourceContract
from tests.servers import find_mariadb, mariadb

SETTINGS = Settings(threads=2, memory_limit="512MB", connect_timeout=2)
MARIADB = find_mariadb()


pytestmark = MARIADB.needed()

Make = Callable[..., Project]


def connect(database: str) -> pymysql.connections.Connection:
    return pymysql.connect(host=MARIADB.host, port=MARIADB.port, user="root", database=database)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("mysql_scanner", "ducklake", "sqlite_scanner"))


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
        url = f"mysql://{database}:a%20secret%2F%3A%40@{MARIADB}/{database}"
        (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
        return load_project(tmp_path)

    return make_project


def read(project: Project, table: str) -> tuple[list[str], list[tuple]]:
    manifest = extract_table(project, SETTINGS, batch=new_batch_id(), table=table)
    assert manifest.rows == manifest.source_rows
    rows = rows_of(project, manifest)
    return [column.type for column in manifest.columns], rows


def rows_of(project: Project, manifest: Manifest) -> list[tuple]:
    with open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for path in staged_files(project, manifest)]
        result = connection.execute("FROM read_parquet(?) ORDER BY 1", [files])
        assert [str(column[1]) for column in result.description] == [column.type for column in manifest.columns]
        return result.fetchall()


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
    assert rows == [(*[expected for _, expected, _ in columns.values()], 2), (2, *[None] * (len(columns) - 1), 4)]


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("timestamp", "0000-00-00 00:00:00"),
        ("date", "0000-00-00"),
        ("date", "2024-02-31"),
        ("datetime", "0000-00-00 00:00:00"),
        ("date", "2024-00-01"),
    ],
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


def test_rare_declarations_arrive(make: Make):
    project = make("""
        CREATE TABLE t (id int, y year, b bit(64), d decimal(10,2) unsigned zerofill, f double(10,2) unsigned,
            e enum('a'), c char(5) binary, dd date, s set('x') not null, v varchar(9) invisible default 'seen',
            n double) WITH SYSTEM VERSIONING;
        SET sql_mode = ''; INSERT INTO t (id, y, b, d, f, e, c, dd, s, n) VALUES
            (1, 0, x'ffffffffffffffff', 1.5, 2.25, 'no', 'a  ', '0001-01-01', '', -1.7976931348623157e308);
        UPDATE t SET id = 2;
    """)

    types, rows = read(project, "t")

    assert types[:5] == ["INTEGER", "INTEGER", "BLOB", "DECIMAL(10,2)", "DOUBLE"]
    assert rows == [
        (2, 0, b"\xff" * 8, Decimal("1.5"), 2.25, "", "a", dt.date(1, 1, 1), "", "seen", -1.7976931348623157e308)
    ]


def test_large_values_and_many_columns_arrive(make: Make):
    many = ", ".join(f"c{number} tinyint DEFAULT {number % 100}" for number in range(1000))  # InnoDB's limit is 1,017
    project = make(f"""
        CREATE TABLE big (x longtext, raw longblob);
        INSERT INTO big VALUES (repeat('é', 2097152), unhex(repeat('00ff', 2097152)));
        CREATE TABLE many ({many}); INSERT INTO many VALUES ();
    """)

    assert read(project, "big")[1] == [("é" * 2**21, b"\x00\xff" * 2**21)]
    assert read(project, "many")[1] == [tuple(number % 100 for number in range(1000))]


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


ACCOUNTS = ("a", "b", "c", "d")


@contextmanager
def transfers(database: str) -> Iterator[list[int]]:
    """Move one at a time from account to account, in a transaction each, while the block runs; count them."""
    done, is_over = [0], threading.Event()

    def move() -> None:
        with closing(connect(database)) as connection:
            while not is_over.is_set():
                source, target = random.sample(ACCOUNTS, 2)
                with connection.cursor() as cursor:
                    cursor.execute(f"UPDATE {source} SET n = n - 1 WHERE id = 7")
                    cursor.execute(f"UPDATE {target} SET n = n + 1 WHERE id = 7")
                connection.commit()
                done[0] += 1

    writer = threading.Thread(target=move)
    writer.start()
    try:
        yield done
    finally:
        is_over.set()
        writer.join()


def wait_for_more(done: list[int]) -> None:
    before, deadline = done[0], time.monotonic() + 20
    while done[0] < before + 3:
        assert time.monotonic() < deadline, "the writer is stuck"
        time.sleep(0.01)


EXTRACT = """
import sys
from pathlib import Path
from phasewise.staging.extract import extract_table
from phasewise.project.config import load_project
from phasewise.settings import Settings
for table in sys.argv[2:]:
    extract_table(load_project(Path(sys.argv[1])), Settings(), batch="b1", table=table)
"""


def test_a_sum_that_a_writer_keeps_is_intact_in_the_lake(make: Make, database: str):
    rows = "SELECT seq AS id, 10 AS n, repeat('x', 100) AS pad FROM seq_1_to_5000"
    project = make("".join(f"CREATE TABLE {one} (id int PRIMARY KEY, n int, pad text) {rows};" for one in ACCOUNTS))
    mariadb(f"GRANT RELOAD ON *.* TO {database}@'%'")
    begin_batch(project, "b1", ACCOUNTS)
    settings = SETTINGS.model_copy(update={"table_concurrency": 2})  # one of three processes waits

    with transfers(database) as done:
        wait_for_more(done)
        with open_snapshot(project, settings, "b1") as token:
            for tables in ACCOUNTS[:1], ACCOUNTS[1:]:
                processes = [
                    subprocess.Popen([sys.executable, "-c", EXTRACT, str(project.root), table]) for table in tables
                ]
                assert [process.wait(timeout=50) for process in processes] == [0] * len(tables)
                wait_for_more(done)
    publish_sample(project, settings, "b1")

    total = " + ".join(f"(SELECT sum(n) FROM {one})" for one in ACCOUNTS)
    with open_reader(project, settings) as connection:
        assert connection.execute(f"SELECT {total}").fetchone() == (4 * 5000 * 10,)
    manifests = list_manifests(project, "b1")
    assert all(one.rows == one.source_rows == 5000 for one in manifests)
    assert {one.snapshot for one in manifests} == {token["id"]}
    assert token["remark"] is None


def test_without_a_lock_one_connection_holds_the_moment_and_says_why(make: Make, database: str):
    project = make(
        "CREATE TABLE a (n int); CREATE TABLE b (n int); INSERT INTO a VALUES (60); INSERT INTO b VALUES (40)"
    )

    with open_snapshot(project, SETTINGS, "b1") as token:
        first = extract_table(project, SETTINGS, batch="b1", table="a")
        mariadb("UPDATE a SET n = 50; UPDATE b SET n = 50", database)
        second = extract_table(project, SETTINGS, batch="b1", table="b")

    assert rows_of(project, first) + rows_of(project, second) == [(60,), (40,)]
    assert first.snapshot == second.snapshot == token["id"]
    assert "Access denied" in token["remark"]
    assert "GRANT RELOAD" in token["remark"]


def test_a_lock_that_is_not_to_be_had_holds_nobody_up(make: Make, database: str, monkeypatch: pytest.MonkeyPatch):
    project = make("CREATE TABLE t (id int)")
    mariadb(f"GRANT RELOAD ON *.* TO {database}@'%'")
    monkeypatch.setattr(mysql_snapshot, "_LOCK_SECONDS", 1)

    with closing(connect(database)) as other:
        other.query("LOCK TABLES t WRITE")
        with open_snapshot(project, SETTINGS, "b1") as token:
            pass

    assert "Lock wait timeout" in token["remark"]


def test_a_login_that_fails_is_the_reason_why_no_moment_is_held(make: Make, database: str):
    project = make("CREATE TABLE t (id int)")
    toml = project.root / "phasewise.toml"
    toml.write_text(toml.read_text().replace(f"{MARIADB}/{database}", f"{MARIADB}/{database}?ssl_mode=required"))
    project = load_project(project.root)

    with open_snapshot(project, SETTINGS, "b1") as token:
        pass

    assert token["id"] is None
    assert "SSL" in token["remark"]


def test_tables_without_transactions_and_other_machines_are_not_at_the_moment(
    make: Make, database: str, monkeypatch: pytest.MonkeyPatch
):
    project = make("CREATE TABLE t (id int); CREATE TABLE u (id int) ENGINE = MyISAM; INSERT INTO u VALUES (1)")

    with open_snapshot(project, SETTINGS, "b1"):
        mariadb("INSERT INTO t VALUES (1); INSERT INTO u VALUES (2)", database)
        held = extract_table(project, SETTINGS, batch="b1", table="t")
        unheld = extract_table(project, SETTINGS, batch="b1", table="u")
        monkeypatch.setattr(protocol.platform, "node", lambda: "elsewhere")
        elsewhere = extract_table(project, SETTINGS, batch="b2", table="t", snapshot=read_token(project))

    assert (held.rows, held.snapshot_note) == (0, None)
    assert (unheld.rows, unheld.snapshot, unheld.snapshot_note) == (2, None, "its engine has no transactions")
    assert (elsewhere.rows, elsewhere.snapshot) == (1, None)
    assert elsewhere.snapshot_note.endswith("this table was read on elsewhere")


def test_the_parts_of_a_table_are_not_read_at_different_moments(make: Make, monkeypatch: pytest.MonkeyPatch):
    project = make(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT seq FROM seq_1_to_9; ANALYZE TABLE t",
        "[table.t]\npartition_rows = 3\n",
    )
    begin_batch(project, "b1", ["t"])

    with open_snapshot(project, SETTINGS, "b1") as token:
        first, *_ = plan_partitions(project, SETTINGS, "b1", token)["t"].list_names()
        monkeypatch.setattr(protocol.platform, "node", lambda: "elsewhere")
        with pytest.raises(StagingError, match=r"must be of one moment: .*read on elsewhere.*partition_rows = 0"):
            extract_table(project, SETTINGS, batch="b1", table="t", partition=first)


def read_token(project: Project) -> dict:
    return json.loads((project.staging / "b1" / "snapshot.json").read_text())


def test_a_table_that_fails_in_the_middle_of_its_rows_leaves_the_moment_to_the_next(make: Make, database: str):
    project = make("""
        CREATE TABLE big (id int, d date, pad text);
        INSERT INTO big SELECT seq, '2024-01-01', repeat('x', 500) FROM seq_1_to_100000;
        UPDATE big SET d = '0000-00-00' WHERE id = 1;
        CREATE TABLE t (id int); INSERT INTO t VALUES (1);
    """)
    settings = SETTINGS.model_copy(update={"table_concurrency": 1})

    with open_snapshot(project, settings, "b1") as token:
        leave_in_the_middle(token["socket"])
        mariadb("UPDATE t SET id = 2; UPDATE big SET d = '2024-01-01'", database)
        with pytest.raises(UnfaithfulValue, match="1 row holds a value .* 0000-00-00"):
            extract_table(project, settings, batch="b1", table="big")
        manifest = extract_table(project, settings, batch="b1", table="t")

    assert manifest.snapshot == token["id"]
    assert rows_of(project, manifest) == [(1,)]


def leave_in_the_middle(path: str) -> None:
    """Ask for many rows, and go when the first are there, as a process that is killed does."""
    connection = pymysql.connect(unix_socket=path)
    connection._execute_command(COMMAND.COM_QUERY, "SELECT a.id, a.pad, b.pad FROM big a, big b")
    assert connection._sock.recv(100)
    connection._force_close()


def test_a_moment_that_the_server_has_ended_is_an_error(make: Make, database: str):
    project = make("CREATE TABLE t (id int)")

    with open_snapshot(project, SETTINGS, "b1"):
        mariadb(f"KILL USER {database}@'%'")
        with pytest.raises(SourceUnavailable, match=r"cannot be entered: .*Start a new batch"):
            extract_table(project, SETTINGS, batch="b1", table="t")


def test_a_moment_is_given_up_when_it_is_held_for_too_long(make: Make, database: str):
    project = make("CREATE TABLE t (id int)")
    mariadb(f"GRANT RELOAD ON *.* TO {database}@'%'")
    settings = SETTINGS.model_copy(update={"source_snapshot_hours": 1 / 3600, "table_concurrency": 2})
    held = f"SELECT count(*) FROM information_schema.processlist WHERE user = '{database}'"

    with open_snapshot(project, settings, "b1"):
        assert mariadb(held).strip() == "3"
        deadline = time.monotonic() + 20
        while mariadb(held).strip() != "0":
            assert time.monotonic() < deadline, "the server still holds the moment"
            time.sleep(0.1)
        with pytest.raises(SourceUnavailable, match=r"hours old\. Start a new batch"):
            extract_table(project, settings, batch="b1", table="t")


def test_what_a_killed_holder_left_goes_with_the_next(make: Make):
    project = make("CREATE TABLE t (id int)")
    code = (
        "import os, sys; from pathlib import Path; from phasewise.staging.source_snapshot import open_snapshot;"
        "from phasewise.project.config import load_project; from phasewise.settings import Settings;"
        "project = load_project(Path(sys.argv[1]));"
        "held = open_snapshot(project, Settings(), 'b1'); print(held.__enter__()['socket'], flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(project.root)]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=50, check=False)
    folder = Path(killed.stdout.strip()).parent
    assert folder.is_dir()
    os.utime(folder, (0, 0))

    with open_snapshot(project, SETTINGS, "b1") as first, open_snapshot(project, SETTINGS, "b2"):
        assert not folder.exists()
        assert Path(first["socket"]).exists()


def test_nothing_of_a_moment_is_left(make: Make, database: str):
    project = make("CREATE TABLE t (id int)")

    with open_snapshot(project, SETTINGS, "b1") as token, socket.socket(socket.AF_UNIX) as waiting:
        assert stat.S_IMODE(Path(token["socket"]).parent.stat().st_mode) == 0o700
        waiting.connect(token["socket"])

    assert not Path(token["socket"]).parent.exists()
    deadline = time.monotonic() + 10
    while [one for one in threading.enumerate() if one.name.startswith("mysql-moment")]:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


@pytest.mark.parametrize("change", ["port", "password", "database"])
def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path, database: str, change: str):
    password = "topsecret" if change == "password" else "a%20secret%2F%3A%40"
    port = 1 if change == "port" else MARIADB.port
    name = "no_such" if change == "database" else database
    url = f"mysql://{database}:{password}@{MARIADB.host}:{port}/{name}"
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
        return f"mysql://{self.database}:{PASSWORD}@{MARIADB}/{self.database}"
