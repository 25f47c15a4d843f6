"""A large table in parts through a whole batch, while somebody writes to its source."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from phasewise.errors import StagingError
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.staging.batch import begin_batch
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, list_manifests, staged_files
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.source_snapshot import open_snapshot
from tests.servers import find_mariadb, find_postgres, mariadb, psql

SETTINGS = Settings(threads=2, memory_limit="512MB", min_free_bytes=0)
ROWS = 50_000
LIMIT = 13_000
#: Every account once, and no transfer half.
ACCOUNTS = "count(*), count(DISTINCT id), sum(balance)::BIGINT"

POSTGRES = find_postgres()
needs_postgres = POSTGRES.needed()


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("ducklake", "sqlite_scanner", "postgres_scanner"))


@pytest.fixture
def schema() -> Iterator[str]:
    name = f"pw_{uuid.uuid4().hex[:10]}"
    psql(f"CREATE SCHEMA {name}")
    yield name
    psql(f"DROP SCHEMA {name} CASCADE")


def write_project(root: Path, url: str, more: str = "") -> Project:
    (root / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
    return load_project(root)


def postgres_url(schema: str) -> str:
    return f"postgresql://postgres@{POSTGRES}/test?schema={schema}"


def run_batch(project: Project, **environment: str) -> str:
    """Run a whole batch without a server, and return what it printed."""
    settings = {
        "PHASEWISE_PROJECT": str(project.root),
        "PHASEWISE_HOME": str(project.root / "home"),
        "PHASEWISE_PARTITION_ROWS": str(LIMIT),
        "PHASEWISE_MEMORY_LIMIT": "512MB",
        "PHASEWISE_MIN_FREE_BYTES": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "phasewise", "run", "--local"],
        env={**os.environ, **settings, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def writing(transfer: Callable[[int, int, int], None]) -> Iterator[list[int]]:
    """Move amounts between two accounts, one transfer after another, as long as the block runs."""
    done: list[int] = []
    is_over = threading.Event()
    rng = random.Random(1)

    def write() -> None:
        while not is_over.is_set():
            transfer(rng.randint(1, ROWS), rng.randint(1, ROWS), rng.randint(1, 100))
            done.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield done
    finally:
        is_over.set()
        thread.join(timeout=30)


def find_differences(project: Project, attach: str, table: str, source: str) -> list[tuple]:
    """Return the rows that only the lake has, and those that only the source has."""
    with open_session(SETTINGS, extensions=("ducklake", "sqlite_scanner", "postgres_scanner")) as connection:
        attach_lake(connection, project, read_only=True)
        connection.execute(f"ATTACH {attach}")
        ours, theirs = f"FROM lake.main.{table}", f"FROM source.{source}.{table}"
        return [
            row
            for left, right in ((ours, theirs), (theirs, ours))
            for row in connection.execute(f"({left}) EXCEPT ALL ({right})").fetchall()
        ]


def count_published(project: Project, table: str, what: str) -> tuple:
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        row = connection.execute(f"SELECT {what} FROM lake.main.{table}").fetchone()
        assert row is not None
        return row


@needs_postgres
@pytest.mark.timeout(240)
def test_a_postgres_table_in_parts_is_its_source_at_one_moment(tmp_path: Path, schema: str):
    psql(
        f"""
        CREATE TABLE plain (id int PRIMARY KEY, label text, amount numeric(12, 2), day date);
        INSERT INTO plain SELECT i, nullif('v' || i % 1000, 'v7'), i / 3.0, date '2020-01-01' + i % 999
            FROM generate_series(1, {ROWS}) i;
        CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
        INSERT INTO account SELECT i, 0 FROM generate_series(1, {ROWS}) i;
        """,
        schema,
    )
    project = write_project(tmp_path, postgres_url(schema))

    def transfer(giver: int, taker: int, amount: int) -> None:
        # Rows that are updated come to other pages, also where their values stay.
        psql(
            f"BEGIN; UPDATE account SET balance = balance WHERE id BETWEEN {giver} AND {giver + 99}; "
            f"UPDATE account SET balance = balance - {amount} WHERE id = {giver}; "
            f"UPDATE account SET balance = balance + {amount} WHERE id = {taker}; COMMIT;",
            schema,
        )

    with writing(transfer) as transfers:
        printed = run_batch(project)

    server = f"host={POSTGRES.host} port={POSTGRES.port} user=postgres dbname=test"
    attach = f"'{server}' AS source (TYPE postgres, READ_ONLY, SCHEMA '{schema}')"
    assert len(transfers) > 1
    assert "Triggering 8 instances of process-table-etl" in printed, printed
    assert find_differences(project, attach, "plain", schema) == []
    assert count_published(project, "account", ACCOUNTS) == (ROWS, ROWS, 0)


@pytest.mark.timeout(240)
def test_a_sqlite_table_in_parts_is_its_source_at_one_moment(tmp_path: Path):
    path = tmp_path / "source.db"
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})"
    with closing(sqlite3.connect(path)) as source:
        source.executescript(f"""
            PRAGMA journal_mode = WAL;
            CREATE TABLE plain (id INTEGER PRIMARY KEY, label TEXT, part REAL);
            {numbers} INSERT INTO plain SELECT i * 3, nullif('v' || i % 1000, 'v7'), i / 8.0 FROM n;
            CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
            {numbers} INSERT INTO account SELECT i, 0 FROM n;
        """)
    project = write_project(tmp_path, f"sqlite:///{path}")

    def transfer(giver: int, taker: int, amount: int) -> None:
        with closing(sqlite3.connect(path, timeout=20)) as source, source:
            source.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (amount, giver))
            source.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, taker))

    with writing(transfer) as transfers:
        printed = run_batch(project)

    assert len(transfers) > 1
    assert "Triggering 8 instances of process-table-etl" in printed, printed
    assert find_differences(project, f"'{path}' AS source (TYPE sqlite, READ_ONLY)", "plain", "main") == []
    assert count_published(project, "account", ACCOUNTS) == (ROWS, ROWS, 0)


def stage(project: Project, table: str, *, batch: str = "b1", only: int | None = None) -> list[Manifest]:
    """Stage the parts of *table*, or the first *only* of them, at a moment of their own; return what is complete."""
    begin_batch(project, batch, [table])
    with open_snapshot(project, SETTINGS, batch) as snapshot:
        split = plan_partitions(project, SETTINGS, batch, snapshot)[table]
        for name in split.list_names()[:only]:
            extract_table(project, SETTINGS, batch=batch, table=table, partition=name)
    return list_manifests(project, batch)


@needs_postgres
def test_pages_that_are_half_empty_are_divided_by_their_rows(tmp_path: Path, schema: str):
    psql(
        """
        CREATE TABLE skewed (id bigint, label text);
        INSERT INTO skewed SELECT i::bigint * i, 'x' FROM generate_series(1, 60000) i;
        DELETE FROM skewed WHERE ctid < '(200,0)' AND id % 20 <> 0;
        """,
        schema,
    )
    project = write_project(tmp_path, postgres_url(schema), "[table.skewed]\npartition_rows = 6000\n")

    parts = stage(project, "skewed")

    rows = [part.rows for part in parts]
    assert len(rows) > 3
    assert max(rows) <= 2 * min(rows)
    assert sum(rows) == int(psql("SELECT count(*) FROM skewed", schema))


@needs_postgres
def test_a_partitioned_parent_is_divided_by_its_key_in_the_servers_own_order(tmp_path: Path, schema: str):
    psql(
        """
        CREATE TABLE parent (name text COLLATE "en-x-icu", n int, PRIMARY KEY (name, n)) PARTITION BY LIST (name);
        CREATE TABLE child_a PARTITION OF parent FOR VALUES IN ('a', 'A');
        CREATE TABLE child_b PARTITION OF parent DEFAULT;
        INSERT INTO parent SELECT (ARRAY['a', 'A', 'é''x', 'Z', 'z', E'back\\\\slash'])[1 + i % 6], i
            FROM generate_series(1, 20000) i;
        """,
        schema,
    )
    project = write_project(tmp_path, postgres_url(schema), "[table.parent]\npartition_rows = 6000\n")

    parts = stage(project, "parent")

    assert [part.rows for part in parts] == [5000] * 4
    with open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for part in parts for path in staged_files(project, part)]
        counted = connection.execute("SELECT count(DISTINCT (name, n)) FROM read_parquet(?)", [files]).fetchone()
    assert counted == (20000,)


@needs_postgres
def test_more_pages_than_are_counted_are_divided_by_their_rows_however_they_are_filled(tmp_path: Path, schema: str):
    # 12,000 pages of 7 rows, of which every third is counted. Of the first half 6 of 7 rows are deleted, and of the
    # third quarter every third page is empty: a sample of the same place in each three pages would see all, or none.
    psql(
        """
        CREATE TABLE skewed (id int, label text);
        ALTER TABLE skewed ALTER label SET STORAGE PLAIN;
        INSERT INTO skewed SELECT i, repeat('x', 1100) FROM generate_series(1, 84000) i;
        DELETE FROM skewed WHERE ctid < '(6000,0)' AND id % 7 <> 0;
        DELETE FROM skewed WHERE ctid >= '(6000,0)' AND ctid < '(9000,0)' AND (id - 1) / 7 % 3 = 0;
        """,
        schema,
    )
    project = write_project(tmp_path, postgres_url(schema), "[table.skewed]\npartition_rows = 5000\n")

    begin_batch(project, "b1", ["skewed"])
    with open_snapshot(project, SETTINGS, "b1") as snapshot:
        parts = plan_partitions(project, SETTINGS, "b1", snapshot)["skewed"].partitions

    rows = [int(psql(f"SELECT count(*) FROM skewed WHERE {part.condition}", schema)) for part in parts]
    assert int(psql("SELECT pg_relation_size('skewed') / 8192", schema)) == 12000
    assert sum(rows) == 6000 + 14000 + 21000
    assert len(rows) == 9
    assert max(rows) <= 2 * min(rows)


def check_divided_by_cursors(root: Path, url: str, cursors: tuple[str, ...]) -> None:
    """Stage the 20,000 rows of table ``t``, which has no key, by each of its *cursors*; every row comes once."""
    for cursor in cursors:
        (root / cursor).mkdir()
        more = f'[table.t]\nmode = "append"\ncursor = "{cursor}"\npartition_rows = 6000\n'
        project = write_project(root / cursor, url, more)

        parts = stage(project, "t")

        rows = [part.rows for part in parts]
        assert len(rows) == 4, cursor
        assert max(rows) <= 2 * min(rows), (cursor, rows)
        assert len({part.snapshot for part in parts}) == 1
        with open_session(SETTINGS, extensions=()) as connection:
            files = [str(path) for part in parts for path in staged_files(project, part)]
            counted = connection.execute(
                f"SELECT count(*), count(DISTINCT id), count({cursor}) FROM read_parquet(?)", [files]
            ).fetchone()
        assert counted == (20000, 20000, 19600), cursor


@needs_postgres
def test_a_partitioned_parent_without_a_key_is_divided_by_its_cursor(tmp_path: Path, schema: str):
    psql(
        """
        CREATE TABLE t (id int, n bigint, amount numeric(38, 10), day date, moment timestamptz) PARTITION BY HASH (id);
        CREATE TABLE t0 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE t1 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        INSERT INTO t SELECT i, i::bigint * i * i, exp(i / 2000.0), date '0044-03-15 BC' + sqrt(i)::int,
                timestamptz '2024-03-31' + interval '1 us' * i * i FROM generate_series(1, 20000) i;
        UPDATE t SET n = NULL, amount = NULL, day = NULL, moment = NULL WHERE id % 50 = 0;
        """,
        schema,
    )

    check_divided_by_cursors(tmp_path, postgres_url(schema), ("n", "amount", "day", "moment"))


@needs_postgres
def test_a_new_moment_of_postgres_divides_anew_what_was_not_complete(tmp_path: Path, schema: str):
    psql("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 20000);", schema)
    project = write_project(tmp_path, postgres_url(schema), "[table.t]\npartition_rows = 6000\n")
    assert stage(project, "t", only=2) == []
    # Rows of the last pages come to the front: the old bounds would read them twice.
    psql("UPDATE t SET id = -id WHERE id > 19000; DELETE FROM t WHERE id = 1;", schema)

    parts = stage(project, "t")

    assert [part.partition for part in parts] == [f"{n}/4 at moment 2" for n in range(1, 5)]
    assert len({part.snapshot for part in parts}) == 1
    assert sum(part.rows for part in parts) == 19999 == parts[0].table_rows


@needs_postgres
def test_a_table_that_is_written_anew_in_the_middle_never_looks_complete(tmp_path: Path, schema: str):
    psql("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 20000);", schema)
    psql("DELETE FROM t WHERE id < 9000;", schema)
    project = write_project(tmp_path, postgres_url(schema), "[table.t]\npartition_rows = 6000\n")
    begin_batch(project, "b1", ["t"])

    with open_snapshot(project, SETTINGS, "b1") as snapshot:
        names = plan_partitions(project, SETTINGS, "b1", snapshot)["t"].list_names()
        extract_table(project, SETTINGS, batch="b1", table="t", partition=names[0])
        psql("VACUUM FULL t", schema)
        rest = [extract_table(project, SETTINGS, batch="b1", table="t", partition=name) for name in names[1:]]

    assert {part.rows for part in rest} == {0}
    assert sum(part.rows for part in list_manifests(project, "b1")) < rest[0].table_rows
    with pytest.raises(StagingError, match="moment of the source that is gone"):
        extract_table(project, SETTINGS, batch="b1", table="t", partition=names[0])


@pytest.fixture
def database() -> Iterator[str]:
    name = f"pw_{uuid.uuid4().hex[:10]}"
    mariadb(f"CREATE DATABASE {name}")
    yield name
    mariadb(f"DROP DATABASE {name}")


@find_mariadb().needed()
def test_a_mysql_table_is_divided_by_its_key_in_the_servers_own_order(tmp_path: Path, database: str):
    mariadb(
        """
        CREATE TABLE t (name varchar(20) COLLATE utf8mb4_general_ci, n bigint, PRIMARY KEY (name, n));
        INSERT INTO t SELECT concat(if(seq % 2, 'A', 'a'), '''ü', seq % 7), seq FROM seq_1_to_20000;
        CREATE TABLE amounts (amount decimal(30, 10) PRIMARY KEY);
        INSERT INTO amounts SELECT seq / 7 FROM seq_1_to_20000;
        """,
        database,
    )
    more = "".join(f"[table.{table}]\npartition_rows = 6000\n" for table in ("t", "amounts"))
    project = write_project(tmp_path, f"mysql://root@{find_mariadb()}/{database}", more)

    for table, columns in (("t", "(name, n)"), ("amounts", "amount")):
        parts = stage(project, table, batch=table)

        assert [part.rows for part in parts] == [5000] * 4
        assert len({part.snapshot for part in parts}) == 1
        with open_session(SETTINGS, extensions=()) as connection:
            files = [str(path) for part in parts for path in staged_files(project, part)]
            counted = connection.execute(f"SELECT count(DISTINCT {columns}) FROM read_parquet(?)", [files]).fetchone()
        assert counted == (20000,)


@find_mariadb().needed()
def test_a_mysql_table_without_a_key_is_divided_by_its_cursor(tmp_path: Path, database: str):
    mariadb(
        """
        CREATE TABLE t (id int, n bigint unsigned, amount decimal(38, 10), day date, moment timestamp(6) NULL);
        INSERT INTO t SELECT seq, seq * seq * seq, exp(seq / 2000), date '1000-01-01' + interval sqrt(seq) day,
                timestamp '2024-03-31 00:00:00' + interval seq * seq microsecond FROM seq_1_to_20000;
        UPDATE t SET n = NULL, amount = NULL, day = NULL, moment = NULL WHERE id % 50 = 0;
        """,
        database,
    )

    check_divided_by_cursors(tmp_path, f"mysql://root@{find_mariadb()}/{database}", ("amount", "moment"))
