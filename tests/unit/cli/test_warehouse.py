"""The commands on staging and warehouse: what they print and how they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from phasewise.cli.warehouse import audit, diff, plan, rollback, snapshots
from phasewise.errors import AuditFailed, LakeError, NothingStaged, PublishConflict, SourceError, UnknownTable
from phasewise.lake.publications import query_warehouse
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project
from phasewise.publishing.session import open_writer
from phasewise.staging.batch import begin_batch, give_up_tables
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import batch_folder
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, publish_sample, stage_batch, write_project

SOURCE = "create table people (id integer, name text); insert into people values (1, 'Babe'), (2, 'Hank')"
TOML = '[table.people]\nkey = ["id"]\n[[audit]]\nname = "short"\ntable = "people"\nseverity = "warning"\n'
TOML += "sql = \"from people where name = 'Hank'\""


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    return write_project(tmp_path, source=SOURCE, toml=TOML)


def publish(project: Project) -> str:
    batch = stage_batch(project)
    publish_sample(project, SAMPLE_SETTINGS, batch)
    return batch


def test_audit_shows_the_rows_of_the_staged_batch_that_failed(project: Project, capsys: pytest.CaptureFixture[str]):
    change_source(project.root, "insert into people values (2, 'Willie')")
    batch = stage_batch(project)

    with pytest.raises(AuditFailed, match="^1 blocking audit failed"):
        audit("people", show=True)

    printed = capsys.readouterr().out
    assert f"Auditing batch {batch}." in printed
    assert 'Table "people" failed its audit: 1 row breaks unique(id).' in printed
    assert 'Table "people" has a warning: 1 row breaks short.' in printed
    assert "Hank" in printed
    assert "5 audits, 3 passed." in printed


def test_audit_asks_for_no_table_that_was_given_up(project: Project, capsys: pytest.CaptureFixture[str]):
    change_source(project.root, "create table broken (id integer)")
    begin_batch(project, "b1", ["broken", "people"])
    extract_table(project, SAMPLE_SETTINGS, batch="b1", table="people")
    with pytest.raises(AuditFailed):
        audit()
    assert 'table "broken" is not staged' in capsys.readouterr().out

    give_up_tables(project, "b1", {"broken": "it could not be read"})
    audit()

    assert "is not staged" not in capsys.readouterr().out


def test_plan_shows_each_table_and_ends_with_what_could_not_be_loaded(
    project: Project, capsys: pytest.CaptureFixture[str]
):
    plan()
    assert ["people", "full", "all", "2", "0"] in [line.split() for line in capsys.readouterr().out.splitlines()]

    change_source(project.root, "alter table people rename column id to number")
    with pytest.raises(SourceError, match='key column "id" is missing'):
        plan()


def test_audit_without_staging_looks_at_what_is_published(project: Project, capsys: pytest.CaptureFixture[str]):
    publish(project)

    audit()

    assert "Auditing the published tables." in capsys.readouterr().out


def test_audit_does_not_take_a_batch_older_than_what_is_published(project: Project, capsys: pytest.CaptureFixture[str]):
    stage_batch(project, batch="forgotten")
    newer = publish(project)
    audit()
    assert "Auditing the published tables." in capsys.readouterr().out

    batch_folder(project, newer).rename(project.root / "cleaned up")
    audit()

    assert "Auditing the published tables." in capsys.readouterr().out


def test_audit_knows_its_tables(project: Project):
    stage_batch(project)

    with pytest.raises(UnknownTable, match='Did you mean "people"'):
        audit("poeple")


def test_audit_says_what_to_do_when_there_is_nothing(project: Project):
    with pytest.raises(NothingStaged, match="make run-distributed"):
        audit()


def test_batches_are_listed_compared_and_rolled_back(project: Project, capsys: pytest.CaptureFixture[str]):
    first = publish(project)
    change_source(
        project.root, "update people set name = 'Henry' where id = 2; alter table people add column year text"
    )
    second = publish(project)

    diff(first, second)
    compared = capsys.readouterr().out
    rollback(first)
    snapshots()
    listed = capsys.readouterr().out

    assert "+year" in compared
    assert "1 table, 0 without a difference." in compared
    assert [line.split()[3:5] for line in listed.splitlines() if line.split()[3:4] in (["publish"], ["rollback"])] == [
        ["rollback", first],
        ["publish", second],
        ["publish", first],
    ]
    assert query_warehouse(project, SAMPLE_SETTINGS, "select name from people order by id")[1] == [("Babe",), ("Hank",)]
    assert query_warehouse(project, SAMPLE_SETTINGS, "select name from people order by id", at=second) == (
        ["name"],
        [("Babe",), ("Henry",)],
    )


def test_a_batch_that_was_never_published_cannot_be_gone_back_to(project: Project):
    publish(project)

    with pytest.raises(PublishConflict, match='no snapshot of the batch "nope"'):
        rollback("nope")


def test_a_query_that_duckdb_refuses_says_why(project: Project):
    publish(project)

    with pytest.raises(LakeError, match="The query failed: Catalog Error: .*nowhere"):
        query_warehouse(project, SAMPLE_SETTINGS, "from nowhere")


def test_the_warehouse_cannot_be_changed_by_a_query(project: Project):
    publish(project)

    with pytest.raises(LakeError, match="read-only"):
        query_warehouse(project, SAMPLE_SETTINGS, "delete from people")


def test_audit_replay_puts_mended_rows_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    toml = '[table.people]\nkey = ["id"]\nquarantine = ["key"]\nquarantine_limit = 2'
    project = write_project(tmp_path, source=f"{SOURCE}, (2, 'Willie')", toml=toml)
    batch = stage_batch(project)
    publish_sample(project, SAMPLE_SETTINGS, batch)
    with open_writer(project, SAMPLE_SETTINGS) as session:
        session.connection.execute("update lake._quarantine.people set id = 3 where name = 'Willie'")

    audit("people", replay=True)

    assert 'Table "people": 2 rows put back, 0 still in quarantine.' in capsys.readouterr().out
    assert query_warehouse(project, SAMPLE_SETTINGS, "select count(*) from people")[1] == [(3,)]
