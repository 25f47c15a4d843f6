"""A catalog in PostgreSQL: made on first use, one writer at a time on any machine, never a password in a message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from phasewise.errors import LakeError, WarehouseBusy, WarehouseTooNew
from phasewise.lake.publications import diff_batches, query_warehouse
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import WAREHOUSE_FORMAT, attach_lake, has_lake, lock_lake, prepare_lake
from phasewise.project.config import Project, load_project
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.rollback import rollback_batch
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, publish_sample, stage_batch, write_project
from tests.integration.warehouses import postgres_catalog
from tests.servers import find_postgres, postgres_database, psql
from tests.staged import read_manifest

SETTINGS = SAMPLE_SETTINGS

pytestmark = find_postgres().needed()


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "postgres_scanner", "ducklake"))


@pytest.fixture
def catalog() -> Iterator[str]:
    with postgres_catalog() as url:
        yield url


@pytest.fixture
def project(tmp_path: Path, catalog: str) -> Project:
    (tmp_path / "mnt").mkdir()
    return write_project(
        tmp_path,
        source="create table t (id integer primary key, n integer); insert into t values (1, 10), (2, 20);",
        toml=f'[warehouse]\ncatalog = "{catalog}"\ndata = "mnt"\n',
        marts={"total": "select sum(n) as total from t"},
    )


def test_two_lines_put_the_catalog_into_postgresql_and_the_files_elsewhere(project: Project):
    assert not has_lake(project)
    prepare_lake(project, SETTINGS)
    assert not has_lake(project)
    first = stage_batch(project)

    publish_sample(project, SETTINGS, first)

    assert has_lake(project)
    assert not project.warehouse.exists()
    assert list((project.root / "mnt" / "lake" / "main" / "t").glob("*.parquet"))
    # What is staged lies in the folder that all machines reach.
    assert project.staging == project.root / "mnt" / "staging"
    assert query_warehouse(project, SETTINGS, "from total")[1] == [(30,)]


def test_looking_back_and_going_back_work_as_with_a_catalog_in_sqlite(project: Project):
    first = stage_batch(project)
    publish_sample(project, SETTINGS, first)
    change_source(project.root, "update t set n = 21 where id = 2; insert into t values (3, 30);")
    second = stage_batch(project)
    publish_sample(project, SETTINGS, second)

    (difference,) = diff_batches(project, SETTINGS, first, second)
    assert (difference.added, difference.removed, difference.changed) == (1, 0, 1)
    assert query_warehouse(project, SETTINGS, "from total", at=first)[1] == [(30,)]
    rollback_batch(project, SETTINGS, first)
    maintain_lake(project, SETTINGS)

    assert query_warehouse(project, SETTINGS, "from total")[1] == [(30,)]


def test_a_second_writer_is_told_who_holds_the_lock(project: Project):
    with (
        lock_lake(project, timeout=0),
        pytest.raises(WarehouseBusy, match=f"Process {os.getpid()} on .* is writing"),
        lock_lake(project, timeout=0.1),
    ):
        pass

    with lock_lake(project, timeout=5):
        pass


def test_two_catalogs_of_one_database_have_a_lock_each(project: Project, tmp_path: Path):
    with postgres_catalog() as url:
        other = project.model_copy(update={"catalog": url})

        with lock_lake(project, timeout=0), lock_lake(other, timeout=0):
            pass


def test_the_lock_ends_with_the_process_that_holds_it(project: Project):
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from phasewise.lake.warehouse import lock_lake
        from phasewise.project.config import load_project
        with lock_lake(load_project(Path(sys.argv[1])), timeout=0):
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(project.root)], timeout=50, check=False)
    assert done.returncode == -signal.SIGKILL

    # The server needs a moment to see that the connection is closed.
    with lock_lake(project, timeout=5):
        pass


def test_a_warehouse_of_a_newer_phasewise_is_refused(project: Project, catalog: str):
    publish_sample(project, SETTINGS, stage_batch(project))
    psql(f"update {catalog.rpartition('=')[2]}.phasewise_format set format = {WAREHOUSE_FORMAT + 1}")

    with open_session(SETTINGS) as connection, pytest.raises(WarehouseTooNew, match="Nothing was changed"):
        attach_lake(connection, project)


def test_a_catalog_that_does_not_answer_is_named_without_its_password(project: Project, tmp_path: Path):
    url = f"postgresql://postgres:hush@{find_postgres().host}:1/test?schema=x"
    away = project.model_copy(update={"catalog": url})

    with pytest.raises(LakeError, match=r"postgresql://postgres:\*\*\*@.*Connection refused") as caught:
        prepare_lake(away, SETTINGS)

    chain = f"{caught.value} {caught.value.__cause__} {away!r} {away.warehouse_name}"
    assert "hush" not in chain


def test_a_schema_that_may_not_be_created_is_an_error_of_the_warehouse(project: Project, catalog: str):
    role = f"pw_{catalog[-8:]}"
    psql(f"create role {role} login password 'x'")
    try:
        poor = project.model_copy(update={"catalog": catalog.replace("postgres:a%20secret", f"{role}:x")})

        with pytest.raises(LakeError, match="permission denied for database test"):
            prepare_lake(poor, SETTINGS)
    finally:
        psql(f"drop role {role}")


def test_options_of_the_url_reach_the_server(project: Project, catalog: str):
    named = project.model_copy(update={"catalog": f"{catalog}&application_name=it%27s%20me"})
    publish_sample(project, SETTINGS, stage_batch(project))

    with open_session(SETTINGS) as connection:
        attach_lake(connection, named, read_only=True)
        connection.execute("from lake.snapshots()").fetchall()
        assert psql("select count(*) from pg_stat_activity where application_name = 'it''s me'").strip() != "0"


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
def test_names_and_values_are_the_same_whatever_the_encodings_of_writer_and_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
):
    with postgres_database(encoding) as database:
        project = write_project(
            tmp_path,
            source='create table "größe" (id integer primary key, "öl" text); insert into "größe" values (1, \'é\');',
            toml=f'[warehouse]\ncatalog = "postgresql://postgres@{find_postgres()}/{database}"\ndata = "mnt"\n',
            marts={"übersicht": 'select "öl" from "größe"'},
        )
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
        publish_sample(project, SETTINGS, stage_batch(project))
        monkeypatch.delenv("PGCLIENTENCODING")

        assert query_warehouse(project, SETTINGS, 'from "größe"') == (["id", "öl"], [(1, "é")])
        assert query_warehouse(project, SETTINGS, "from marts.übersicht") == (["öl"], [("é",)])


def test_the_password_comes_from_the_environment(project: Project, catalog: str, monkeypatch: pytest.MonkeyPatch):
    file = project.root / "phasewise.toml"
    file.write_text(file.read_text().replace("a%20secret", "${LAKE_PASSWORD}"))
    monkeypatch.setenv("LAKE_PASSWORD", "a%20secret")

    assert load_project(project.root).catalog == catalog


def publish(project: Project, batch: str, sql: str = "") -> None:
    change_source(project.root, sql)
    stage_batch(project, batch=batch)
    publish_sample(project, SETTINGS, batch)


def test_increments_go_on_and_back_and_their_quarantine_with_them(tmp_path: Path, catalog: str):
    modes = ("append", "merge")
    table = '[table.{0}]\nmode = "{0}"\ncursor = "at"\nquarantine_limit = 9\n[[audit]]\nname = "{0} positive"\n'
    table += 'table = "{0}"\nseverity = "quarantine"\nsql = "from {0} where n < 0"\n'
    project = write_project(
        tmp_path,
        source="".join(
            f"create table {mode} (id integer primary key, n int, at integer); insert into {mode} values (1, 10, 1);"
            for mode in modes
        ),
        toml=f'[warehouse]\ncatalog = "{catalog}"\n' + "".join(map(table.format, modes)),
    )

    def look() -> list[tuple[list[int], list[int]]]:
        sql = "select (select list(id order by id) from {0}), (select list(id) from lake._quarantine.{0})"
        return [query_warehouse(project, SETTINGS, sql.format(mode))[1][0] for mode in modes]

    publish(project, "b0")
    publish(project, "b1", "".join(f"insert into {mode} values (2, 20, 2), (3, -1, 3);" for mode in modes))
    change = (
        "update {0} set n = 30, at = 4 where id = 3; insert into {0} values (4, -1, 5); alter table {0} add x text;"
    )
    publish(project, "b2", "".join(map(change.format, modes)))
    maintain_lake(project, SETTINGS)
    assert look() == [([1, 2, 3], [4])] * 2
    rollback_batch(project, SETTINGS, "b1")

    assert look() == [([1, 2], [3])] * 2
    publish(project, "b3")
    assert look() == [([1, 2, 3], [4])] * 2
    assert {read_manifest(project, "b3", mode).load.since for mode in modes} == {"3"}
