"""The whole pipeline on a real server with real workers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pytest

from phasewise.lake.session import find_extension, open_session
from phasewise.lake.warehouse import attach_lake, list_snapshots
from phasewise.project.config import Project, load_project
from phasewise.report.timeline import lay_out_timeline
from phasewise.stack.control import StackInfo
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, publish_sample, stage_batch, write_project
from tests.acceptance.conftest import SHOP, Shell, wait_for
from tests.unit.report.reports import read_report


def call(stack: StackInfo, path: str, body: Any = None) -> Any:
    """POST to the server's API, or GET when there is no body."""
    url = f"{stack.api_url}{path}"
    response = httpx.get(url, timeout=30) if body is None else httpx.post(url, json=body, timeout=30)
    response.raise_for_status()
    return response.json()


def newest_main(stack: StackInfo) -> dict[str, Any]:
    body = {"flows": {"name": {"any_": ["main-etl-job"]}}, "sort": "START_TIME_DESC", "limit": 1}
    [run] = call(stack, "/flow_runs/filter", body)
    return run  # type: ignore[no-any-return]


def children(stack: StackInfo, run_id: str) -> dict[str, dict[str, Any]]:
    """Return the direct children of a flow run by their names."""
    runs = call(stack, "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}}})
    return {run["name"]: run for run in runs}


@contextmanager
def limiting_orchestrators(stack: StackInfo, limit: int) -> Iterator[None]:
    """Let at most *limit* flow runs of the queue ``orchestrators`` run at a time while the block runs."""
    queue = f"{stack.api_url}/work_pools/{stack.pool}/queues/orchestrators"
    before = httpx.get(queue).json()["concurrency_limit"]
    httpx.patch(queue, json={"concurrency_limit": limit}).raise_for_status()
    try:
        yield
    finally:
        httpx.patch(queue, json={"concurrency_limit": before}).raise_for_status()


def read_lake(project: Project) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every published table."""
    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        tables = connection.execute("select table_name from duckdb_tables() where database_name = 'lake'").fetchall()
        return {
            name: connection.execute(f'select * from lake.main."{name}" order by all').fetchall()
            for (name,) in tables
            if name in ("customer", "orders", "stock")
        }


def snapshots(project: Project) -> list[str | None]:
    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        return [snapshot.batch for snapshot in list_snapshots(connection)]


def assert_equals_source(project: Project, source: Path, tables: int) -> None:
    """Compare every table of the lake with its source, row for row and both ways."""
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        for name in ("sqlite_scanner", "ducklake"):
            connection.execute(f"load '{find_extension(name)}'")
        connection.execute(f"attach '{source}' as source (type sqlite, read_only)")
        attach_lake(connection, project, read_only=True)
        names = connection.execute("select table_name from duckdb_tables() where database_name = 'source'").fetchall()
        assert len(names) == tables
        for (name,) in names:
            for left, right in (("source", "lake.main"), ("lake.main", "source.main")):
                left = "source.main" if left == "source" else left
                query = f'select count(*) from (from {left}."{name}" except all from {right}."{name}")'
                assert connection.execute(query).fetchone() == (0,), f"{name}: rows of {left} are not in {right}"


def read_deployments(stack: StackInfo) -> list[dict[str, Any]]:
    """Return the deployments without what changes by itself, such as when a worker asked for their runs."""
    ignored = {"last_polled", "status", "work_queue", "updated"}
    found = call(stack, "/deployments/filter", {})
    return [{key: value for key, value in one.items() if key not in ignored} for one in found]


@pytest.mark.timeout(400)  # 33 flow runs in real processes
def test_27_tables_are_loaded_and_published_as_one_snapshot(
    stack: StackInfo, stack_shell: Shell, baseball: Callable[[Path], None]
) -> None:
    baseball(stack_shell.project)

    project = load_project(stack_shell.project)
    publish_sample(project, SAMPLE_SETTINGS, stage_batch(project))  # a night before this one
    before = snapshots(project)

    ran = stack_shell.phasewise("run-distributed")

    assert ran.returncode == 0, ran.stdout
    main = newest_main(stack)
    assert main["state_type"] == "COMPLETED"
    sub = children(stack, main["id"])["sub-etl-job"]
    tables = [run for name, run in children(stack, sub["id"]).items() if name.startswith("process-table-etl/")]
    assert len(tables) == 27
    assert {run["state_type"] for run in tables} == {"COMPLETED"}
    assert snapshots(project) == [*before, main["id"]]
    assert_equals_source(project, stack_shell.project / "data" / "lahman.sqlite", tables=27)
    assert (project.reports / f"{main['id']}.html").is_file()


@pytest.mark.timeout(300)
def test_a_table_that_cannot_be_extracted_fails_the_run_and_leaves_the_warehouse_alone(
    stack: StackInfo, stack_shell: Shell
) -> None:
    project = write_project(stack_shell.project, source=SHOP)
    assert stack_shell.phasewise("run-distributed").returncode == 0
    before, history = read_lake(project), snapshots(project)
    change_source(stack_shell.project, "insert into customer values (4, 'Barbara');")
    change_source(stack_shell.project, "insert into orders values (13, 4, 'a lot');")

    failed = stack_shell.phasewise("run-distributed")

    assert failed.returncode == 7, failed.stdout
    main = newest_main(stack)
    assert main["state_name"] == "Failed"
    assert "process-table-etl/orders" in main["state"]["message"]
    assert "final-etl-job" not in children(stack, main["id"])
    assert read_lake(project) == before
    assert snapshots(project) == history

    # The rest of the batch was staged: mended and retried, only the broken table is extracted again.
    change_source(stack_shell.project, "update orders set amount = 999 where id = 13;")
    call(stack, f"/flow_runs/{main['id']}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}})
    wait_for(lambda: call(stack, f"/flow_runs/{main['id']}")["state_type"] == "COMPLETED")
    sub = children(stack, main["id"])["sub-etl-job"]
    attempts = {name: run["run_count"] for name, run in children(stack, sub["id"]).items() if "process" in name}
    assert attempts == {"process-table-etl/customer": 1, "process-table-etl/orders": 2, "process-table-etl/stock": 1}
    assert read_lake(project)["orders"][-1] == (13, 4, 999)


@pytest.mark.timeout(200)
def test_a_failed_audit_publishes_nothing_and_lists_the_rows(stack: StackInfo, stack_shell: Shell) -> None:
    audit = '[[audit]]\nname = "no_debts"\ntable = "orders"\nsql = "select * from orders where amount < 0"\n'
    project = write_project(stack_shell.project, source=SHOP, toml=audit)
    change_source(stack_shell.project, "insert into orders values (14, 3, -5);")

    failed = stack_shell.phasewise("run-distributed")

    assert failed.returncode == 7
    assert "no_debts" in failed.stdout
    main = newest_main(stack)
    assert "no_debts" in main["state"]["message"]
    assert not (project.warehouse / "catalog.sqlite").exists() or read_lake(project) == {}
    report = (project.reports / f"{main['id']}.html").read_text()
    assert "no_debts" in report
    assert "-5" in report


@pytest.mark.timeout(200)
def test_run_logs_its_phases_in_order_and_links_its_children(stack: StackInfo, stack_shell: Shell) -> None:
    write_project(stack_shell.project, source=SHOP)
    script = "flows/prefect_flow-worker-flow-v2.py"
    assert stack_shell.run(script, "deploy").returncode == 0

    done = stack_shell.run(script, "run")

    assert done.returncode == 0, done.stdout
    run_id = "[0-9a-f-]{36}"
    expected = [
        r"Starting ETL flow\.\.\.",
        r"Phase 1: Starting pre_etl and sub_etl in parallel\.\.\.",
        rf"Triggered subflow pre-etl-job/pre-etl-deployment \(run_id: {run_id}\)",
        rf"Triggered subflow sub-etl-job/sub-etl-deployment \(run_id: {run_id}\)",
        rf"Flow run {run_id} completed successfully",
        r"Phase 1 completed: pre_etl and sub_etl finished",
        r"Phase 2: Starting final_etl\.\.\.",
        rf"Triggered subflow final-etl-job/final-etl-deployment \(run_id: {run_id}\)",
        rf"Flow run {run_id} completed successfully",
        r"Phase 2 completed: final_etl finished",
        r"ETL flow completed successfully\.",
    ]
    assert re.search(".*".join(expected), done.stdout, re.DOTALL), done.stdout
    main = newest_main(stack)
    assert set(children(stack, main["id"])) == {"pre-etl-job", "sub-etl-job", "final-etl-job"}
    sub = children(stack, main["id"])["sub-etl-job"]
    drawn = call(stack, f"/flow_runs/{sub['id']}/graph-v2")["nodes"]
    assert {node["label"] for _, node in drawn} == {
        "process-table-etl / process-table-etl/customer",
        "process-table-etl / process-table-etl/orders",
        "process-table-etl / process-table-etl/stock",
        "cleanup-flow-1 / cleanup-flow-1",
        "cleanup-flow-2 / cleanup-flow-2",
    }
    logs = call(stack, "/logs/filter", {"logs": {"flow_run_id": {"any_": [sub["id"]]}}, "sort": "TIMESTAMP_ASC"})
    text = "\n".join(log["message"] for log in logs)
    said = [
        r"Triggering 3 instances of process-table-etl\.\.\.",
        r"Waiting for all 3 ETL subflows to complete\.\.\.",
        r"All 3 ETL subflows completed successfully",
        r"Starting cleanup subflows\.\.\.",
        r"Cleanup completed",
    ]
    assert re.search(".*".join(said), text, re.DOTALL), text


@pytest.mark.timeout(180)
def test_deploying_twice_changes_nothing(stack: StackInfo, stack_shell: Shell) -> None:
    write_project(stack_shell.project, source=SHOP)
    script = "flows/prefect_flow-worker-flow-v2.py"
    stack_shell.run(script, "deploy")  # over that of another project of the stack, which it says

    first = stack_shell.run(script, "deploy")
    before = read_deployments(stack)
    second = stack_shell.run(script, "deploy")

    names = ["main-etl-job", "pre-etl-job", "sub-etl-job", "final-etl-job"]
    names += ["process-table-etl", "cleanup-flow-1", "cleanup-flow-2"]
    lines = first.stdout.splitlines()
    assert lines[0] == "🚀 Deploying flows to work pool..."
    assert lines[1:8] == [f"✅ Deployed: {name}" for name in names]
    assert lines[8] == "🎉 All 7 deployments created successfully!"
    assert "Next" in lines[9]
    assert second.stdout == first.stdout
    assert read_deployments(stack) == before
    queues = call(stack, f"/work_pools/{stack.pool}/queues/filter", {})
    assert {queue["name"] for queue in queues} >= {"orchestrators", "tables"}


@pytest.mark.timeout(180)
def test_each_project_of_a_server_can_have_a_deployment_of_its_own(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    write_project(stack_shell.project, source=SHOP)
    (tmp_path / "other").mkdir()
    other = Shell(home=stack_shell.home, project=tmp_path / "other", environment={})
    write_project(other.project, source=SHOP)
    stack_shell.phasewise("deploy")

    own = other.phasewise("deploy", "--main", "other")

    def project_of(name: str) -> str:
        return str(call(stack, f"/deployments/name/main-etl-job/{name}")["job_variables"]["env"]["PHASEWISE_PROJECT"])

    assert own.returncode == 0, own.stdout
    assert "until now" not in own.stdout
    assert project_of("other") == str(other.project)
    assert project_of("main-etl-deployment") == str(stack_shell.project)

    taken = other.phasewise("deploy")

    assert f"ran {stack_shell.project} until now" in taken.stdout
    assert "phasewise deploy --main" in taken.stdout
    # A batch more that the deadlock check would count, in each test that follows.
    extra = call(stack, "/deployments/name/main-etl-job/other")["id"]
    httpx.delete(f"{stack.api_url}/deployments/{extra}").raise_for_status()


@pytest.mark.timeout(300)
def test_a_project_adds_a_step_and_a_phase(stack: StackInfo, stack_shell: Shell) -> None:
    write_project(stack_shell.project, source=SHOP, toml='[pipeline]\nphases = "pipeline.py:PHASES"\n')
    example = Path(__file__).parents[2] / "examples" / "custom_pipeline" / "pipeline.py"
    (stack_shell.project / "pipeline.py").write_text(example.read_text())

    assert stack_shell.phasewise("deploy").returncode == 0  # the first one makes the queue
    with limiting_orchestrators(stack, 2):  # pre_etl and sub_etl run one after the other
        done = stack_shell.phasewise("run-distributed")

    assert done.returncode == 0, done.stdout
    main = newest_main(stack)
    runs = children(stack, main["id"])
    assert set(runs) == {"pre-etl-job", "sub-etl-job", "profile-source", "final-etl-job", "prune-reports"}
    assert runs["prune-reports"]["start_time"] > runs["final-etl-job"]["end_time"]
    assert runs["profile-source"]["start_time"] < runs["sub-etl-job"]["end_time"]
    first, second = sorted((runs["pre-etl-job"], runs["sub-etl-job"]), key=lambda run: str(run["start_time"]))
    assert first["end_time"] <= second["start_time"]
    reports = stack_shell.project / ".phasewise" / "reports"
    report = read_report(reports / f"{main['id']}.json")
    assert {run.name: run.phase for run in report.runs} == {
        "main-etl-job": None,
        "pre-etl-job": "load",
        "sub-etl-job": "load",
        "profile-source": "load",
        "process-table-etl/customer": "tables",
        "process-table-etl/orders": "tables",
        "process-table-etl/stock": "tables",
        "cleanup-flow-1": "cleanup",
        "cleanup-flow-2": "cleanup",
        "final-etl-job": "publish",
    }
    assert [phase.name for phase in lay_out_timeline(report).phases] == ["load", "publish"]
    assert runs["prune-reports"]["labels"]["phasewise-phase"] == "tidy"
    assert (reports / f"{main['id']}.profile.json").is_file()
