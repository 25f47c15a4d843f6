"""A Prefect that is newer than the tested ones, and has renamed what Phasewise patches: it works, only slower."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from phasewise.stack.control import running_stack
from tests.integration.conftest import Runs

RENAMED = Path(__file__).parent / "renamed"
VERSION = {"prefect._build_info": [['__version__ = "', '__version__ = "3.99.0" or "']]}

#: What is patched in the server and in runs, under other names.
TARGETS = {
    "prefect.server.database.dependencies": [["def set_query_components", "def use_query_components"]],
    "prefect.flow_engine": [["_send_heartbeats", "_beat"]],
    "prefect.results": [["_read_server_default_result_storage_block_id", "_read_default_storage"]],
}
#: What a run is forked and watched with: without it nothing is.
RUNNER = {
    module: [["create_isolated_termination_scope", "create_scope"]]
    for module in (
        "prefect.runner._process_manager",
        "prefect.runner._starter_engine",
        "prefect.runner._workspace_supervisor",
    )
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("changes", "skipped"),
    [(TARGETS, ["insert-rows", "own-heartbeats", "known-result-storage"]), (RUNNER, ["fork-runs"])],
    ids=["patches", "runner"],
)
async def test_a_newer_prefect_with_other_names_runs_flows(
    changes: dict[str, list[list[str]]], skipped: list[str], tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(RENAMED), "PHASEWISE_TEST_RENAMED": json.dumps({**VERSION, **changes})}
    async with AsyncExitStack() as left:
        stack = left.enter_context(running_stack(tmp_path, pool="warm", workers=1, project_env=environment))
        with temporary_settings({PREFECT_API_URL: stack.api_url}):
            client = await left.enter_async_context(get_client())
        run = await Runs(client=client, pool="warm").finish("completed", seconds=150)

    assert run.state is not None
    assert run.state.is_completed(), run.state.message
    logs = {file.stem: file.read_text() for file in (tmp_path / "logs").glob("*.log")}
    said = "\n".join(logs.values())
    assert logs["server"].count("Prefect 3.99.0 is newer than 3.9.1") == 1
    assert logs["worker-1"].count("Prefect 3.99.0 is newer than 3.9.1") >= 1  # and once in each forkserver
    for name in skipped:
        assert f"Patch {name} is not applied: " in said
