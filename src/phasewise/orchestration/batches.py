"""The batches of a project on the server: found again, cancelled, resumed. A batch is a main_etl run."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Abort, ObjectNotFound
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingRetry, Cancelled, Cancelling

from phasewise.errors import BatchCancelled, BatchRunning, UnknownBatch
from phasewise.orchestration.cancel import cancel_runs
from phasewise.orchestration.run_reads import READ_SIZE, of_types
from phasewise.project.pipeline import MAIN_ETL
from phasewise.system.processes import identify_process

#: Label of a main_etl run: the folder of its project.
PROJECT_LABEL = "phasewise-project"
#: Label of a main_etl run: the process that it runs in.
PROCESS_LABEL = "phasewise-process"
#: Seconds before it is due from which on a batch counts as one that is on its way.
_DUE_SECONDS = 60.0


async def find_batch(project: Path, batch: str | None = None, *, states: Sequence[StateType] = ()) -> FlowRun:
    """Return the main_etl run *batch* (its id, or the beginning of it), or the newest of *project* in *states*.

    Raises:
        UnknownBatch: there is none.
    """
    async with get_client() as client:
        runs = await read_main_runs(client, list(states) if batch is None else [])
    if batch is not None:
        found = [run for run in runs if str(run.id).startswith(batch.lower())]
        if len(found) != 1:
            raise UnknownBatch(
                f'{len(found)} batches begin with "{batch}".' if found else f'There is no batch "{batch}".',
                hint="Find the ids in the Prefect UI: they are those of the main-etl-job runs.",
            )
        return found[0]
    async with get_client() as client:
        mine = [run for run in runs if _is_due(run) and await _find_project(client, run) == str(project)]
    if not mine:
        wanted = " or ".join(state.value.lower() for state in states) or "known"
        raise UnknownBatch(f"No batch of {project} is {wanted}.", hint="Name one by its id.")
    # One that runs comes before one that waits for its turn.
    return min(mine, key=lambda run: run.state is None or run.state.is_scheduled())


def _is_due(run: FlowRun) -> bool:
    """Return whether *run* is on its way, or was: a schedule creates the runs of many nights ahead."""
    if run.state is None or not run.state.is_scheduled():
        return True
    due = run.next_scheduled_start_time or run.expected_start_time
    return due is None or due <= datetime.now(UTC) + timedelta(seconds=_DUE_SECONDS)


async def _find_project(client: PrefectClient, run: FlowRun) -> str | None:
    """Return the folder of the project that *run* is of; one that has not begun has not said so itself."""
    if (label := run.labels.get(PROJECT_LABEL)) is not None:
        return str(label)
    if (told := read_project(run.job_variables)) is not None or run.deployment_id is None:
        return told
    try:
        deployment = await client.read_deployment(run.deployment_id)
    except ObjectNotFound:
        return None
    return read_project(deployment.job_variables)


def read_project(job_variables: Mapping[str, Any] | None) -> str | None:
    """Return the folder of the project that flow runs with these job variables are of."""
    project: str | None = ((job_variables or {}).get("env") or {}).get("PHASEWISE_PROJECT")
    return project


async def cancel_batch(run_id: UUID) -> int:
    """Cancel a batch and everything below it, all levels at once; return how many runs were asked to end."""
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        below = await cancel_runs(client, [run.id])
        if run.state is not None and not run.state.is_final() and run.deployment_id is None:
            # It is in a process of the user's, which looks at its state by itself, if it lives. No worker does it.
            await client.set_flow_run_state(run.id, Cancelled(message="Cancelled."), force=True)
        elif run.state is not None and not run.state.is_final() and run.id not in below:
            await client.set_flow_run_state(run.id, Cancelling(message="Cancelled."))
        return len(below)


async def resume_batch(run_id: str, *, process: str | None = None) -> FlowRun:
    """Schedule a batch that did not complete again: it runs what did not complete, and nothing else.

    One that was started in a process of the user's is no worker's to run: whoever runs it names its *process*.

    Raises:
        BatchRunning: it has not ended yet; a second process of it would get into the first one's way.
        UnknownBatch: there is nothing to resume: it completed.
    """
    async with get_client() as client:
        run = await client.read_flow_run(UUID(run_id))
        if run.state is None or not run.state.is_final():
            raise BatchRunning(
                f"Batch {run_id} has not ended: it is {run.state.name if run.state else 'without a state'}.",
                hint=f"If it hangs, cancel it first: phasewise cancel {run_id}",
            )
        if run.state.is_completed():
            raise UnknownBatch(
                f"Batch {run_id} is complete, so there is nothing to resume.",
                hint="Start a new one: make run-distributed",
            )
        if process is not None:
            # Before it runs: the process that it still names is gone, and a run of such a process counts as crashed.
            await client.update_flow_run_labels(run.id, {PROCESS_LABEL: process})
        await client.set_flow_run_state(run.id, AwaitingRetry(message="Resumed."), force=True)
        return await client.read_flow_run(run.id)


async def run_here(main_etl: Flow[[], Coroutine[Any, Any, Any]], resume: str | None = None) -> None:
    """Run *main_etl* in this process, recorded on the server; *resume* is the id of a batch that did not complete.

    Raises:
        FlowRunsFailed: a step did not complete; no later phase was started.
        BatchRunning: another batch of the project is running, or *resume* has not ended.
        BatchCancelled: it was cancelled, in the UI or by command.
    """
    try:
        if resume is None:
            await main_etl()
        else:
            run = await resume_batch(resume, process=identify_process(os.getpid()))
            await run_flow_async(main_etl, flow_run=run)
    except Abort as exc:
        raise BatchCancelled(str(exc), hint="What it staged is kept for a resume: phasewise resume") from exc


async def read_main_runs(client: PrefectClient, states: Sequence[StateType]) -> list[FlowRun]:
    """Return the newest main_etl runs, those in *states* if any are given, newest first."""
    return await client.read_flow_runs(
        flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=[MAIN_ETL.flow_name])),
        flow_run_filter=of_types(states),
        sort=FlowRunSort.START_TIME_DESC,
        limit=READ_SIZE,
    )
