"""The warehouse as a folder: attached, kept, moved, locked."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from phasewise.errors import LakeError, WarehouseBusy, WarehouseTooNew
from phasewise.lake import warehouse
from phasewise.lake.publications import open_reader
from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import WAREHOUSE_FORMAT, attach_lake, has_lake, list_snapshots, lock_lake
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings

SETTINGS = Settings(threads=2, memory_limit="256MB")


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("ducklake", "sqlite_scanner"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "sqlite:///s.db"\n')
    return load_project(tmp_path)


def fill(project: Project) -> None:
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project)
        connection.execute("CREATE TABLE lake.t AS SELECT 42 AS answer")


def test_reading_a_warehouse_that_does_not_exist_says_what_to_run(project: Project):
    assert not has_lake(project)

    with open_session(SETTINGS) as connection, pytest.raises(LakeError, match="Publish a batch first"):
        attach_lake(connection, project, read_only=True)

    assert not project.warehouse.exists()


def test_a_catalog_that_a_killed_publisher_left_without_tables_is_filled_by_the_next(project: Project):
    fill(project)
    catalog = project.warehouse / "catalog.sqlite"
    catalog.unlink()
    with closing(sqlite3.connect(catalog)) as empty:
        empty.execute("PRAGMA journal_mode = WAL")  # what DuckDB does first

    assert not has_lake(project)
    with open_session(SETTINGS) as connection, pytest.raises(LakeError, match="Publish a batch first"):
        attach_lake(connection, project, read_only=True)

    fill(project)

    assert has_lake(project)
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        assert connection.execute("SELECT answer FROM lake.t").fetchall() == [(42,)]


def test_a_warehouse_keeps_its_tables_and_its_snapshots(project: Project):
    fill(project)

    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        assert connection.execute("SELECT answer FROM lake.t").fetchall() == [(42,)]
        assert [snapshot.id for snapshot in list_snapshots(connection)] == [0, 1]


def test_a_snapshot_names_its_batch(project: Project):
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project)
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE lake.t (a INTEGER)")
        info = quote_literal(json.dumps({"batch": "batch-1"}))
        connection.execute(f"CALL lake.set_commit_message('phasewise', 'publish', extra_info => {info})")
        connection.execute("COMMIT")

        newest = list_snapshots(connection)[-1]

    assert newest.batch == "batch-1"
    assert newest.at.tzinfo is not None


def test_a_warehouse_is_seen_as_of_a_snapshot(project: Project):
    fill(project)

    with open_session(SETTINGS) as connection:
        attach_lake(connection, project)
        connection.execute("DROP TABLE lake.t")
        attach_lake(connection, project, snapshot=1, name="before")
        assert connection.execute("SELECT answer FROM before.t").fetchall() == [(42,)]


@pytest.mark.parametrize("options", [{}, {"read_only": True}, {"snapshot": 1}, {"snapshot": 1, "name": "past"}])
def test_a_session_reads_a_catalog_in_sqlite_through_one_connection(project: Project, options: dict[str, Any]):
    fill(project)

    with open_session(SETTINGS) as connection:
        assert find_scan_setting(connection) == ("false", "GLOBAL")  # a session that reads a source keeps its threads
        attach_lake(connection, project, **options)

        assert find_scan_setting(connection) == ("true", "GLOBAL")


def find_scan_setting(connection: duckdb.DuckDBPyConnection) -> tuple[str, str]:
    query = "SELECT value, scope FROM duckdb_settings() WHERE name = 'sqlite_disable_multithreaded_scans'"
    return connection.execute(query).fetchone()


def test_a_catalog_in_sqlite_is_attached_in_one_place():
    """Readers, audits, publishing, cleanup, replay and diff have the setting because none attaches by itself."""
    files = [
        path for path in Path(warehouse.__file__).parents[1].rglob("*.py") if "ducklake:sqlite" in path.read_text()
    ]

    assert files == [Path(warehouse.__file__)]
    assert files[0].read_text().count("ducklake:sqlite") == 1


@contextmanager
def open_plain(project: Project, settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    with open_session(settings) as connection:
        attach_lake(connection, project, read_only=True)
        yield connection


@pytest.mark.parametrize("open_lake", [open_plain, open_reader])
def test_a_transaction_sees_its_snapshot_while_others_publish_and_expire(project: Project, open_lake: Any):
    """Without the setting no table has rows: the files are looked up on a connection that sees the newest catalog."""
    with open_session(SETTINGS) as writer:
        attach_lake(writer, project)
        writer.execute("CREATE SCHEMA lake.marts")
        for table in ("first", "second"):
            writer.execute(f"CREATE TABLE lake.{table} AS SELECT 1 AS night FROM range(500)")
        with open_lake(project, SETTINGS) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM lake.first").fetchall()
            for table in ("first", "second"):
                writer.execute(f"DELETE FROM lake.{table}")
                writer.execute(f"INSERT INTO lake.{table} SELECT 2 FROM range(500)")
            writer.execute("CALL ducklake_expire_snapshots('lake', older_than => now()::TIMESTAMP)")

            counts = "SELECT max(night), count(*) FROM lake.{}"
            found = [reader.execute(counts.format(table)).fetchone() for table in ("first", "second")]

    assert found == [(1, 500), (1, 500)]


def test_a_warehouse_can_be_moved(project: Project, tmp_path: Path):
    fill(project)
    project.warehouse.rename(tmp_path / "moved")
    moved = project.model_copy(update={"warehouse": tmp_path / "moved"})

    with open_session(SETTINGS) as connection:
        attach_lake(connection, moved, read_only=True)
        assert connection.execute("SELECT answer FROM lake.t").fetchall() == [(42,)]


@pytest.mark.parametrize("version", ["2.0", "1.1", "1.1-dev1"])
def test_a_warehouse_of_a_newer_ducklake_is_refused_and_not_migrated(project: Project, version: str):
    fill(project)
    with closing(sqlite3.connect(project.warehouse / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE ducklake_metadata SET value = ? WHERE key = 'version'", (version,))

    with open_session(SETTINGS) as connection, pytest.raises(WarehouseTooNew, match="Upgrade phasewise"):
        attach_lake(connection, project)


def test_a_warehouse_of_a_newer_phasewise_is_refused(project: Project):
    fill(project)
    (project.warehouse / "phasewise.json").write_text(json.dumps({"format": WAREHOUSE_FORMAT + 1}))

    with open_session(SETTINGS) as connection, pytest.raises(WarehouseTooNew, match="Nothing was changed"):
        attach_lake(connection, project)


def test_a_catalog_that_is_no_database_is_an_error_of_the_warehouse(project: Project):
    project.warehouse.mkdir()
    (project.warehouse / "catalog.sqlite").write_text("no database" * 100)

    with open_session(SETTINGS) as connection, pytest.raises(LakeError, match="file is not a database"):
        attach_lake(connection, project)


def test_a_second_writer_is_told_who_holds_the_lock(project: Project):
    with (
        lock_lake(project, timeout=0),
        pytest.raises(WarehouseBusy, match=f"Process {os.getpid()} on .* is writing"),
        lock_lake(project, timeout=0.1),
    ):
        pass

    with lock_lake(project, timeout=0):
        pass


def test_the_lock_ends_with_the_process_that_holds_it(project: Project):
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from phasewise.lake import session, warehouse
        from phasewise.project.config import load_project
        with warehouse.lock_lake(load_project(Path(sys.argv[1])), timeout=0):
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    subprocess.run([sys.executable, "-c", code, str(project.root)], timeout=50, check=False)

    with lock_lake(project, timeout=0):
        pass
