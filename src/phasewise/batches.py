"""The batches of a project on the server: one at a time, found again, cancelled, resumed. A batch is a main_etl run."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry, Cancelled, Cancelling
from prefect.types import KeyValueLabels

from phasewise.errors import BatchRunning, UnknownBatch
from phasewise.flow_runs import cancel_runs, describe_run
from phasewise.outcomes import StepOutcome

MAIN_FLOW = "main-etl-job"
#: Label of a main_etl run: the folder of its project.
PROJECT_LABEL = "phasewise-project"
#: Label of a main_etl run: the process that it runs in.
PROCESS_LABEL = "phasewise-process"
_PAGE = 200
_WAIT_SECONDS = 2.0
#: Seconds in which a run that began says which project it is of, and between two looks whether it has.
_LABEL_SECONDS = 10.0
_LOOK_SECONDS = 0.2


async def claim_batch(run_id: str, project: Path, *, on_overlap: Literal["refuse", "wait"] = "refuse") -> None:
    """Make *run_id* the one batch of *project* that runs; with ``on_overlap="wait"`` once the others have ended.

    Two that start at the same moment see each other: the one that began to run first goes on. The other waits until
    that one has said which project it is of.

    Raises:
        BatchRunning: another batch of the project is running; it is named.
    """
    async with get_client() as client:
        labels: KeyValueLabels = {PROJECT_LABEL: str(project), PROCESS_LABEL: identify_process(os.getpid())}
        await client.update_flow_run_labels(UUID(run_id), labels)
        patience = time.monotonic() + _LABEL_SECONDS
        while True:
            earlier = await _find_earlier(client, run_id)
            rivals = [run for run in earlier if run.labels.get(PROJECT_LABEL) == str(project)]
            if rivals and on_overlap == "refuse":
                raise _explain_rival(rivals[0])
            # One that began this instant has not said yet which project it is of.
            is_unclear = any(PROJECT_LABEL not in run.labels for run in earlier) and time.monotonic() < patience
            if not rivals and not is_unclear:
                return
            await asyncio.sleep(_WAIT_SECONDS if rivals else _LOOK_SECONDS)


def identify_process(pid: int) -> str:
    """Return ``host/pid/start``: *start* tells the process from a later one with the same number."""
    return f"{socket.gethostname()}/{pid}/{_read_start(pid)}"


def is_process_gone(identity: str) -> bool:
    """Tell whether the process that ``identify_process`` named has ended; False where that cannot be known here."""
    host, _, rest = identity.partition("/")
    pid, _, start = rest.partition("/")
    return host == socket.gethostname() and start.isdigit() and pid.isdigit() and _read_start(int(pid)) != start


def _read_start(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty when there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


async def _find_earlier(client: PrefectClient, run_id: str) -> list[FlowRun]:
    """Return the main_etl runs, of whatever project, that began to run before *run_id*, or are being cancelled."""
    runs = await read_main_runs(client, [StateType.RUNNING, StateType.CANCELLING])
    own = next((run for run in runs if str(run.id) == run_id), None)
    since = _running_since(own) if own else (datetime.max.replace(tzinfo=UTC), run_id)
    # For one that is being cancelled the time is that of its cancelling; what it began runs on until that is through.
    return [run for run in runs if run is not own and (_running_since(run) < since or _is_cancelling(run))]


def _is_cancelling(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_cancelling()


def _running_since(run: FlowRun) -> tuple[datetime, str]:
    # The state's time and not the run's start: a batch that is resumed began long ago, but runs only since now.
    return (run.state.timestamp if run.state else datetime.max.replace(tzinfo=UTC), str(run.id))


def _explain_rival(rival: FlowRun) -> BatchRunning:
    since = _running_since(rival)[0]
    return BatchRunning(
        f"Batch {rival.id} of this project is running since {since:%Y-%m-%d %H:%M:%S} UTC.",
        hint=f'Wait for it, or end it: phasewise cancel {rival.id} (or set on_overlap = "wait" in phasewise.toml).',
    )


async def find_batch(project: Path, batch: str | None = None, *, states: Sequence[StateType] = ()) -> StepOutcome:
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
                hint="Their ids are those of the main-etl-job runs in the Prefect UI.",
            )
        return describe_run(found[0])
    mine = [run for run in runs if run.labels.get(PROJECT_LABEL) == str(project)]
    if not mine:
        wanted = " or ".join(state.value.lower() for state in states) or "known"
        raise UnknownBatch(f"No batch of {project} is {wanted}.", hint="Name one by its id.")
    return describe_run(mine[0])


async def cancel_batch(run_id: str) -> int:
    """Cancel a batch and everything below it, all levels at once; return how many runs were asked to end."""
    async with get_client() as client:
        run = await client.read_flow_run(UUID(run_id))
        below = await cancel_runs(client, [run.id])
        if run.state is not None and not run.state.is_final() and run.infrastructure_pid is None:
            # It was started in a process of the user's, which no worker watches: nobody else would end it.
            await client.set_flow_run_state(run.id, Cancelled(message="Cancelled."), force=True)
        elif run.state is not None and not run.state.is_final() and run.id not in below:
            await client.set_flow_run_state(run.id, Cancelling(message="Cancelled."))
        return len(below)


async def resume_batch(run_id: str) -> None:
    """Schedule a batch that did not complete again: it runs what did not complete, and nothing else.

    Raises:
        BatchRunning: it has not ended yet; a second process of it would get into the first one's way.
        UnknownBatch: there is nothing to resume: it completed, or no worker can run it.
    """
    async with get_client() as client:
        run = await client.read_flow_run(UUID(run_id))
        if run.state is None or not run.state.is_final():
            raise BatchRunning(
                f"Batch {run_id} has not ended: it is {run.state.name if run.state else 'without a state'}.",
                hint=f"End it first if it hangs: phasewise cancel {run_id}",
            )
        if run.state.is_completed():
            raise UnknownBatch(
                f"Batch {run_id} is complete, so there is nothing to resume.",
                hint="Start a new one: make run-distributed",
            )
        if run.deployment_id is None:
            raise UnknownBatch(
                f"Batch {run_id} was not started as a deployment, so no worker can run it again.",
                hint="Start a new one: make run-distributed",
            )
        await client.set_flow_run_state(run.id, AwaitingRetry(message="Resumed."), force=True)


async def read_main_runs(client: PrefectClient, states: Sequence[StateType]) -> list[FlowRun]:
    """Return the newest main_etl runs, those in *states* if any are given, newest first."""
    state_filter = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))) if states else None
    return await client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[MAIN_FLOW])),
        flow_run_filter=FlowRunFilter(state=state_filter),
        sort=FlowRunSort.START_TIME_DESC,
        limit=_PAGE,
    )
