"""Flows without a server. Runs in the main process.

A flow that waits for others gets a process tree below it; any other one is called here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from prefect import Flow

from phasewise.local.engine import NoFlowRuns, entering_flow_run, install
from phasewise.local.runs import LocalFlowRuns
from phasewise.orchestration.batch_lock import lock_staging
from phasewise.orchestration.deployments import list_deployments
from phasewise.orchestration.flow_runs import LOCAL_RUN, LocalRun, has_server
from phasewise.project.config import find_project, load_project
from phasewise.project.pipeline import Step, load_phases
from phasewise.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")


class EtlFlow(Flow[P, R]):
    """A flow that runs in this process where there is no server to record it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:  # type: ignore[override]  # Prefect overloads it
        if has_server():
            return super().__call__(*args, **kwargs)
        function: Callable[[], Any] = partial(self.fn, *args, **kwargs)
        if LOCAL_RUN.get() is not None:
            return function()
        if self.isasync:  # those that wait for other flows
            return _run_tree(self.name, function, str(uuid4()))
        install()
        local = LocalRun(run_id=str(uuid4()), flow_runs=NoFlowRuns(self.name), read_runs=list)
        with entering_flow_run(local, name=self.name, flow=self):
            return function()


def etl_flow(step: Step) -> Callable[[Callable[P, R]], EtlFlow[P, R]]:
    """Make a function the flow that *step* runs."""

    def decorate(function: Callable[P, R]) -> EtlFlow[P, R]:
        # Results travel as labels of the run (report_summary); stored ones would have to be shared between machines.
        return EtlFlow(function, name=step.flow_name, persist_result=False)

    return decorate


async def run_local(main_etl: Flow[..., Any], batch: str | None = None) -> dict[str, Any]:
    """Run *main_etl* and everything below it in one process tree, without a server; return what it returns.

    *batch* is the id of one that did not complete: what it staged is not extracted again.

    Raises:
        FlowRunsFailed: a step did not complete; no later phase was started.
        BatchRunning: another batch of the project is running.
    """
    return await _run_tree(main_etl.name, main_etl.fn, batch or str(uuid4()))


async def _run_tree(name: str, function: Callable[[], Awaitable[dict[str, Any]]], run_id: str) -> dict[str, Any]:
    """Await *function* as the flow run *run_id*, with a process tree for the flow runs below it."""
    settings = Settings()
    project = load_project(find_project(settings))
    deployments = list_deployments(load_phases(project.root, project.pipeline.phases), project.root)
    flow_runs = LocalFlowRuns(
        {deployment.full_name: deployment for deployment in deployments},
        table_concurrency=settings.table_concurrency,
        cancel_grace_seconds=settings.cancel_grace_seconds,
        preload=("duckdb", "phasewise.flows"),
        setup=("phasewise.lake.session:preload_extensions",),
        environment={"PHASEWISE_PROJECT": str(project.root)},
    )
    async with (
        lock_staging(project.staging, run_id, on_overlap=project.pipeline.on_overlap),
        flow_runs,
        flow_runs.running(name, run_id),
    ):
        return await function()
