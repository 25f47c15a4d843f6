"""The flow `final_etl`: whatever goes wrong leaves a report, and a report that goes wrong leaves what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phasewise.errors import PublishConflict, SchemaDrift
from phasewise.flows import final_etl
from phasewise.lake.publications import list_tables, open_reader
from phasewise.project.config import Project
from phasewise.publishing.publish import publish_batch
from phasewise.publishing.rollback import rollback_batch
from phasewise.staging.batch import begin_batch, give_up_tables
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import batch_folder
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, stage_batch, write_project

SOURCE = "create table t (id integer primary key, n decimal(10,2)); insert into t values (1, 1.25);"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    toml = '[table.t]\nmode = "merge"\ndrift = "discard"\n'
    project = write_project(tmp_path, source=SOURCE, toml=toml)
    stage_batch(project, batch="b0")
    final_etl("b0")
    return project


def read_report(project: Project, batch: str) -> dict[str, object]:
    return json.loads((project.reports / f"{batch}.json").read_text())


def test_drift_that_the_audits_meet_leaves_a_report(project: Project):
    change_source(project.root, "drop table t;" + SOURCE.replace("10,2", "18,4").replace("1.25", "1.1234"))
    stage_batch(project, batch="b1")

    with pytest.raises(SchemaDrift, match=r"does not hold 1\.1234"):
        final_etl("b1")

    report = read_report(project, "b1")
    assert (report["status"], [table["status"] for table in report["tables"]]) == ("failed", ["staged"])
    assert "does not hold 1.1234" in report["message"]


def test_a_batch_that_goes_on_from_another_than_the_lake_s_leaves_a_report(project: Project):
    stage_batch(project, batch="b1")
    final_etl("b1")
    stage_batch(project, batch="b2")
    rollback_batch(project, SAMPLE_SETTINGS, "b0")

    with pytest.raises(PublishConflict, match='staged on top of batch "b1"'):
        final_etl("b2")

    assert 'staged on top of batch "b1"' in read_report(project, "b2")["message"]


def test_a_report_that_cannot_be_written_leaves_the_batch_published_and_says_what_to_do(project: Project):
    change_source(project.root, "insert into t values (2, 2.5)")
    stage_batch(project, batch="b1")
    kept = project.reports.rename(project.reports.with_name("kept"))
    project.reports.touch()

    result = final_etl("b1")

    assert (result["batch_id"], result["rows"]) == ("b1", 2)
    assert (result["reports_generated"], result["report"]) == (False, None)
    assert 'The batch "b1" is published, as snapshot' in result["report_error"]
    assert "run final-etl-job without a batch" in result["report_error"]
    assert not list(kept.glob("b1.*"))
    project.reports.unlink()
    assert final_etl()["reports_generated"]
    assert read_report(project, "b1")["status"] == "renewed"


def test_an_unpublished_batch_older_than_the_published_one_is_not_taken(project: Project):
    stage_batch(project, batch="forgotten")
    stage_batch(project, batch="b1")
    final_etl("b1")
    batch_folder(project, "b1").rename(project.root / "cleaned up")

    assert final_etl()["batch_id"] == "b1"


def test_a_table_that_ends_between_audit_and_publishing_is_not_published_unaudited(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    change_source(project.root, "create table u (id integer primary key); insert into u values (1);")
    begin_batch(project, "b1", ["t", "u"])
    extract_table(project, SAMPLE_SETTINGS, batch="b1", table="t")
    give_up_tables(project, "b1", {"u": "it failed"})

    def end_then_publish(project: Project, *args: object) -> object:
        extract_table(project, SAMPLE_SETTINGS, batch="b1", table="u")
        return publish_batch(project, *args)

    monkeypatch.setattr("phasewise.report.finish.publish_batch", end_then_publish)

    assert final_etl("b1")["tables"] == 1

    report = read_report(project, "b1")
    assert {table["name"]: table["status"] for table in report["tables"]} == {"u": "kept", "t": "published"}
    assert {audit["table"] for audit in report["audits"]} <= {None, "t"}
    with open_reader(project, SAMPLE_SETTINGS) as connection:
        assert list_tables(connection, "lake.main") == ["t"]


def test_a_file_that_changed_after_its_audit_leaves_a_report_and_what_to_do(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    change_source(project.root, "update t set n = 7.5")
    stage_batch(project, batch="b1")
    [file] = batch_folder(project, "b1").glob("t/*.parquet")

    def flip_then_publish(*args: object) -> object:
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
        return publish_batch(*args)

    monkeypatch.setattr("phasewise.report.finish.publish_batch", flip_then_publish)

    with pytest.raises(PublishConflict, match=f"{file.name} has changed. Nothing was published. Start a new batch"):
        final_etl("b1")

    assert read_report(project, "b1")["status"] == "failed"
    assert "has changed" in read_report(project, "b1")["message"]
