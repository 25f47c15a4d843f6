"""The deployments need no worker of ours: the whole pipeline on a work pool of Prefect's type ``process``."""

from __future__ import annotations

import pytest

from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake
from phasewise.stack.control import running_stack
from phasewise.testing.projects import SAMPLE_SETTINGS, write_project
from tests.acceptance.conftest import POOL, SHOP, Shell
from tests.acceptance.test_pipeline import call, children, newest_main


@pytest.mark.timeout(420)
def test_the_pipeline_runs_unchanged_on_a_pool_of_prefects_process_type(shell: Shell) -> None:
    # One table: a flow run of this type takes seconds to start.
    project = write_project(shell.project, source=SHOP, toml='[tables]\ninclude = ["orders"]\n')
    settings = {"PREFECT_WORKER_QUERY_SECONDS": "2"}
    with running_stack(shell.home, pool=POOL, workers=1, worker_type="process", project_env=settings) as stack:
        ran = shell.phasewise("run-distributed")
        main = newest_main(stack)
        [sub] = [run for run in children(stack, main["id"]).values() if run["name"].startswith("sub-etl")]
        runs = [main, *children(stack, main["id"]).values(), *children(stack, sub["id"]).values()]
        [pool] = call(stack, "/work_pools/filter", {})

    assert ran.returncode == 0, ran.stdout
    assert pool["type"] == "process"
    assert len(runs) == 7
    assert {run["state"]["name"] for run in runs} == {"Completed"}
    assert {run["labels"]["prefect.worker.type"] for run in runs} == {"process"}
    with open_session(SAMPLE_SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        assert connection.execute("select count(*) from lake.main.orders").fetchone() == (3,)
