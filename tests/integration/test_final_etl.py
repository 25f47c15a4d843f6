"""The flow `final_etl`: whatever goes wrong leaves a report, and a report that goes wrong leaves what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phasewise.errors import PublishConflict, SchemaDrift
from phasewise.flows import final_etl
from phasewise.project.config import Project
from phasewise.publishing.rollback import rollback_batch
from phasewise.staging.batch import find_batch_folder
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
    find_batch_folder(project, "b1").rename(project.root / "cleaned up")

    assert final_etl()["batch_id"] == "b1"
