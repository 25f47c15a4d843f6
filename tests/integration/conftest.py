"""A stack of its own for the tests that need a Prefect server and a worker."""

from __future__ import annotations

import asyncio
import sysconfig
import time
import venv
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from phasewise.stack.control import StackInfo, running_stack

FLOWS = Path(__file__).parent / "worker_flows.py"
POOL = "warm"


def create_python(folder: Path) -> Path:
    """Make a virtual environment in *folder* that finds the packages of ours; returns its interpreter."""
    venv.create(folder, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def stack_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="session")
def stack(stack_home: Path) -> Iterator[StackInfo]:
    """One stack with one worker, for all tests that do not break it."""
    with running_stack(stack_home, pool=POOL, workers=1) as info:
        yield info


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Deploys the flows of worker_flows.py and runs them on a work pool."""

    client: PrefectClient
    pool: str

    async def deploy(self, name: str, *, folder: Path = FLOWS.parent, entrypoint: str = "", **options: Any) -> UUID:
        flow_id = await self.client.create_flow_from_name(name.replace("_", "-"))
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
        return await self.client.create_deployment(
            flow_id=flow_id,
            name=f"on-{self.pool}",
            work_pool_name=self.pool,
            entrypoint=entrypoint or f"{FLOWS.name}:{name}",
            parameter_openapi_schema={},
            enforce_parameter_schema=False,
            **{"pull_steps": [step], **options},
        )

    async def start(
        self, name: str, *, entrypoint: str = "", job_variables: dict[str, Any] | None = None, **parameters: Any
    ) -> FlowRun:
        return await self.client.create_flow_run_from_deployment(
            await self.deploy(name, entrypoint=entrypoint), parameters=parameters, job_variables=job_variables
        )

    async def until(self, run: FlowRun, *names: str, seconds: float = 30) -> FlowRun:
        """Wait until the state of *run* has one of *names*, or is final when none is given."""
        deadline = time.monotonic() + seconds
        while True:
            found = await self.client.read_flow_run(run.id)
            assert found.state is not None
            if found.state.name in names or (not names and found.state.is_final()):
                return found
            assert time.monotonic() < deadline, f"it is {found.state.name}: {found.state.message}"
            await asyncio.sleep(0.05)

    async def finish(self, name: str, *, seconds: float = 30, **options: Any) -> FlowRun:
        return await self.until(await self.start(name, **options), seconds=seconds)

    async def states(self, run: FlowRun) -> list[str]:
        return [state.name or "" for state in await self.client.read_flow_run_states(run.id)]


@pytest.fixture
async def runs(stack: StackInfo) -> AsyncIterator[Runs]:
    with temporary_settings({PREFECT_API_URL: stack.api_url}):
        async with get_client() as client:
            yield Runs(client=client, pool=stack.pool)
