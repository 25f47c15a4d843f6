"""The adapter to a Prefect server keeps the same promises as the one in memory and the one in a process tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from phasewise.orchestration.deployments import Deployment, deploy
from phasewise.orchestration.flow_runs import FlowRuns
from phasewise.orchestration.prefect_runs import PrefectFlowRuns
from phasewise.settings import Settings
from phasewise.stack.control import StackInfo
from tests.unit.orchestration.flow_runs_contract import FlowRunsContract

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _server(stack: StackInfo) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: stack.api_url}):
        yield


@pytest.mark.timeout(120)  # a process for each run, on a machine that may be busy
class TestPrefectFlowRuns(FlowRunsContract):
    @pytest.fixture
    async def flow_runs(self, stack: StackInfo) -> FlowRuns:  # type: ignore[override]
        deployments = [
            Deployment(
                flow_name=name,
                name="d",
                entrypoint=f"tests/unit/local/local_flows.py:{name}",
                work_queue="tables",
                root=ROOT,
            )
            for name in ("work", "crash", "stuck")
        ]
        await deploy(deployments, pool=stack.pool, settings=Settings())
        return PrefectFlowRuns(poll_seconds=5)
