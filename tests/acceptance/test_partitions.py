"""A table in parts on a server with real workers: it is published whole, or not at all."""

from __future__ import annotations

import json

import pytest

from phasewise.stack.control import StackInfo
from phasewise.testing.projects import change_source, write_project
from tests.acceptance.conftest import Shell, wait_for

pytestmark = pytest.mark.timeout(300)

SOURCE = """
create table payment (id integer primary key, amount integer);
insert into payment with recursive n(i) as (select 1 union all select i + 1 from n where i < 300) select i, i from n;
create table stock (item text primary key);
insert into stock values ('bolt');
"""
TOML = "[table.payment]\npartition_rows = 100\n"
BREAK = "update payment set amount = 'a lot' where id = 250;"


def query(shell: Shell, sql: str) -> str:
    done = shell.phasewise("query", sql)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_table_one_part_of_which_failed_within_the_budget_keeps_its_last_version_whole(
    stack: StackInfo, stack_shell: Shell
) -> None:
    write_project(stack_shell.project, source=SOURCE, toml=f"{TOML}[pipeline]\nallow_failed = 1\n")
    first = stack_shell.phasewise("run-distributed")
    assert first.returncode == 0, first.stdout
    change_source(stack_shell.project, f"update payment set amount = -1; {BREAK} delete from stock;")

    done = stack_shell.phasewise("run-distributed")

    assert done.returncode == 0, done.stdout
    found = query(
        stack_shell,
        "select (select sum(amount) from payment) || ' paid, ' || (select count(*) from stock) || ' left' as found",
    )
    assert f"{sum(range(1, 301))} paid, 0 left" in found


def test_a_resume_after_the_source_was_mended_extracts_every_part_at_the_new_moment(
    stack: StackInfo, stack_shell: Shell
) -> None:
    project = write_project(stack_shell.project, source=SOURCE + BREAK, toml=TOML)
    failed = stack_shell.phasewise("run-distributed")
    change_source(stack_shell.project, "update payment set amount = 1;")
    [batch] = [folder.name for folder in project.staging.iterdir() if (folder / "batch.json").exists()]

    resumed = stack_shell.phasewise("resume", batch)

    report_file = project.reports / f"{batch}.json"
    wait_for(report_file.exists)  # written last
    assert failed.returncode == 7, failed.stdout
    assert "process-table-etl/payment 3/3 Failed" in failed.stdout
    assert resumed.returncode == 0, resumed.stdout
    assert "300 rows of 1" in query(
        stack_shell, "select count(*) || ' rows of ' || max(amount) as found from payment where amount = 1"
    )
    report = json.loads(report_file.read_text())
    [payment] = [table for table in report["tables"] if table["name"] == "payment"]
    assert payment["notes"] == ["staged in 3 partitions of 100 to 100 rows"]
    names = [run["name"] for run in report["runs"] if run["state"] == "Completed" and "payment" in run["name"]]
    assert [name for name in names if name.endswith("at moment 2")] != []
