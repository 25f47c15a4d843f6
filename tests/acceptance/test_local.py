"""A whole batch without a server: ``phasewise run --local`` in a real process tree."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, list_snapshots
from phasewise.orchestration.batch_lock import lock_staging
from phasewise.project.config import Project, load_project
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, write_project
from tests.acceptance.conftest import CHECKOUT, SHOP, Shell, wait_for

pytestmark = pytest.mark.timeout(200)

#: Flow run → the phase that the built-in pipeline declares for it.
PHASES = {
    "main-etl-job": None,
    "pre-etl-job": "load",
    "sub-etl-job": "load",
    "process-table-etl/customer": "tables",
    "process-table-etl/orders": "tables",
    "process-table-etl/stock": "tables",
    "cleanup-flow-1": "cleanup",
    "cleanup-flow-2": "cleanup",
    "final-etl-job": "publish",
}


@pytest.fixture
def shop(shell: Shell) -> Project:
    return write_project(shell.project, source=SHOP)


def snapshots(project: Project) -> list[str | None]:
    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        return [snapshot.batch for snapshot in list_snapshots(connection)]


def read_report(project: Project) -> dict[str, object]:
    [file] = project.reports.glob("*.json")
    report: dict[str, object] = json.loads(file.read_text())
    return report


def processes_of(shell: Shell) -> list[int]:
    marker = f"PHASEWISE_HOME={shell.home}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue  # it ended, or is not ours
    return found


def test_a_local_run_publishes_and_reports_like_one_on_a_server(shell: Shell, shop: Project) -> None:
    ran = shell.phasewise("run", "--local")

    assert ran.returncode == 0, ran.stdout
    expected = [
        "Starting ETL flow...",
        "Phase 1: Starting pre_etl and sub_etl in parallel...",
        "Triggered subflow pre-etl-job/pre-etl-deployment (run_id: ",
        "Triggering 3 instances of process-table-etl...",
        "Waiting for all 3 ETL subflows to complete...",
        "All 3 ETL subflows completed successfully",
        "Starting cleanup subflows...",
        "Cleanup completed",
        "Phase 1 completed: pre_etl and sub_etl finished",
        "Phase 2: Starting final_etl...",
        "ETL flow completed successfully.",
    ]
    places = [ran.stdout.find(line) for line in expected]
    assert -1 not in places, ran.stdout
    assert places == sorted(places)
    report = read_report(shop)
    assert snapshots(shop)[-1] == report["batch"]
    runs = report["runs"]
    assert isinstance(runs, list)
    names = {run["run_id"]: run["name"] for run in runs}
    parents = {run["name"]: names.get(run["parent"]) for run in runs}
    assert parents == {
        "main-etl-job": None,
        "pre-etl-job": "main-etl-job",
        "sub-etl-job": "main-etl-job",
        "process-table-etl/customer": "sub-etl-job",
        "process-table-etl/orders": "sub-etl-job",
        "process-table-etl/stock": "sub-etl-job",
        "cleanup-flow-1": "sub-etl-job",
        "cleanup-flow-2": "sub-etl-job",
        "final-etl-job": "main-etl-job",
    }
    assert {run["name"]: run["phase"] for run in runs} == PHASES
    ended = [run for run in runs if run["name"] not in ("main-etl-job", "final-etl-job")]
    assert all(run["started_at"] and run["ended_at"] and run["state"] == "Completed" for run in ended)
    assert processes_of(shell) == []


def test_a_table_that_fails_publishes_nothing_and_the_batch_can_be_resumed(shell: Shell, shop: Project) -> None:
    change_source(shop.root, "insert into orders values (13, 3, 'a lot');")
    failed = shell.phasewise("run", "--local")
    [batch] = [folder.name for folder in shop.staging.iterdir() if folder.is_dir()]
    before = (shop.staging / batch / "stock" / "manifest.json").read_text()
    change_source(shop.root, "update orders set amount = 999 where id = 13;")

    resumed = shell.phasewise("run", "--local", "--resume", batch[:8])

    assert failed.returncode == 7, failed.stdout
    assert "process-table-etl/orders Failed" in failed.stdout
    assert "Triggered subflow final-etl-job" not in failed.stdout
    assert resumed.returncode == 0, resumed.stdout
    assert snapshots(shop)[-1] == batch
    assert (shop.staging / batch / "stock" / "manifest.json").read_text() == before


def test_an_unknown_batch_is_not_resumed(shell: Shell, shop: Project) -> None:
    ran = shell.phasewise("run", "--local", "--resume", "nothing")

    assert ran.returncode == 8
    assert 'begin with "nothing"' in ran.stdout


async def test_a_second_local_batch_is_refused_and_names_the_first(shell: Shell, shop: Project) -> None:
    async with lock_staging(shop.staging, "batch-1"):
        ran = shell.phasewise("run", "--local")

    assert ran.returncode == 8
    assert "Batch batch-1 of this project is running" in ran.stdout


def test_main_etl_called_without_a_server_runs_locally(shell: Shell, shop: Project) -> None:
    code = "import asyncio, phasewise.flows as f; print('RESULT', sorted(asyncio.run(f.main_etl())))"

    ran = shell.python(code)

    assert ran.returncode == 0, ran.stdout
    assert "RESULT ['final_etl_run_id', 'pre_etl_run_id', 'status', 'sub_etl_run_id']" in ran.stdout
    assert len(snapshots(shop)) > 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_local_run_that_is_ended(shell: Shell, shop: Project, how: signal.Signals) -> None:
    with shell.start("-m", "phasewise", "run", "--local") as process:
        wait_for(lambda: len(processes_of(shell)) > 2 or process.poll() is not None)
        os.kill(process.pid, how)
        output, _ = process.communicate(timeout=60)

    wait_for(lambda: processes_of(shell) == [], seconds=30)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), output
    assert shell.phasewise("run", "--local").returncode == 0


def test_a_step_and_a_phase_of_ones_own_run_locally_too(shell: Shell, lahman: Path) -> None:
    shutil.copytree(CHECKOUT / "examples" / "custom_pipeline", shell.project, dirs_exist_ok=True)
    settings = shell.project / "phasewise.toml"
    settings.write_text(settings.read_text().replace("sqlite:///../baseball/data/lahman.sqlite", f"sqlite:///{lahman}"))

    ran = shell.phasewise("run", "--local")

    assert ran.returncode == 0, ran.stdout
    project = load_project(shell.project)
    assert len(list(project.reports.glob("*.profile.json"))) == 1
    assert ran.stdout.index("Phase 3: Starting prune_reports...") > ran.stdout.index("Phase 2 completed")


def test_the_example_is_published_without_a_server(shell: Shell, baseball: Callable[[Path], None]) -> None:
    baseball(shell.project)

    ran = shell.phasewise("run", "--local")

    assert ran.returncode == 0, ran.stdout
    assert "All 27 ETL subflows completed successfully" in ran.stdout
    assert len(read_report(load_project(shell.project))["marts"]) >= 5  # type: ignore[arg-type]
