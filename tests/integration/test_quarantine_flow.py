"""The flow `final_etl` with a quarantine: what it returns and what its report shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phasewise.flows import final_etl
from phasewise.testing.projects import stage_batch, write_project


def test_the_result_and_the_report_say_how_many_rows_are_in_quarantine_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    project = write_project(
        tmp_path,
        source="create table notes (id integer, n integer); insert into notes values (1, 1), (2, -2), (2, 3), (4, 4)",
        toml='[table.notes]\nkey = ["id"]\nquarantine = ["key"]\nquarantine_limit = "50%"',
    )
    batch = stage_batch(project)

    result = final_etl(batch)

    assert (result["rows"], result["quarantined"], result["warnings"]) == (2, 2, 0)
    report = json.loads((project.reports / f"{batch}.json").read_text())
    [table] = report["tables"]
    assert (table["rows"], table["notes"]) == (2, ["2 rows are in quarantine: unique(id) 2"])
    [audit] = [audit for audit in report["audits"] if audit["severity"] == "quarantine" and not audit["passed"]]
    assert (audit["name"], audit["bad_rows"]) == ("unique(id)", 2)
    html = (project.reports / f"{batch}.html").read_text()
    assert "2 rows are in quarantine: unique(id) 2" in html
    assert "1 set rows aside" in html
