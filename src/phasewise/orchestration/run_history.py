"""What the server remembers of past batches: their flow runs with their times."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from phasewise.orchestration.flow_runs import LOCAL_RUN, has_server
from phasewise.orchestration.run_reads import READ_SIZE, describe_run, iterate_pages, of_types
from phasewise.outcomes import StepOutcome

#: How many batches the duration of an item is the median of.
_BATCHES = 3


def read_batch_runs(batch: str) -> list[StepOutcome]:
    """Return the flow run that *batch* is, and all flow runs below it, parents before children, at any depth.

    Empty when no server recorded them, or it does not know the run. Two reads per level and 200 runs.
    """
    if (local := LOCAL_RUN.get()) is not None:
        return local.read_runs()
    if not has_server() or batch.startswith("manual-"):
        return []
    with get_client(sync_client=True) as client:
        root = client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[UUID(batch)]))
        )
        runs = [describe_run(run) for run in root]
        parents = [run.id for run in root]
        while parents:
            level = _read_children(client, parents)
            runs += [describe_run(run, parent_id=parent) for run, parent in level]
            parents = [run.id for run, _ in level]
        return runs


def read_durations(flow_name: str, *, max_runs: int = 400) -> dict[str, float]:
    """Return item → seconds for the runs ``<flow_name>/<item>`` that completed: the median of an item's last three.

    Looks at the last *max_runs* completed runs of the flow, 200 a read: ask for three times the number of items.
    Three, so that one night on a busy machine does not decide the next. Items that never completed are missing, and
    all are where no server answers: what this is good for is not worth a batch.
    """
    seconds: dict[str, list[float]] = {}
    with suppress(httpx.HTTPError):
        for run in islice(_read_completed(flow_name), max_runs):
            _, _, item = run.name.partition(f"{flow_name}/")
            if item:
                seconds.setdefault(item, []).append(run.total_run_time.total_seconds())
    return {item: statistics.median(newest_first[:_BATCHES]) for item, newest_first in seconds.items()}


def _read_completed(flow_name: str) -> Iterator[FlowRun]:
    """Yield the completed runs of a flow, those that ended last first."""
    if not has_server():
        return
    with get_client(sync_client=True) as client:
        yield from iterate_pages(
            client.read_flow_runs,
            flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=[flow_name])),
            flow_run_filter=of_types([StateType.COMPLETED]),
            sort=FlowRunSort.END_TIME_DESC,
        )


def _read_children(client: SyncPrefectClient, parents: Sequence[UUID]) -> list[tuple[FlowRun, str]]:
    """Return the children of *parents*, each with its parent's run id."""
    below = filters.FlowRunFilter(parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=list(parents)))
    order = FlowRunSort.EXPECTED_START_TIME_ASC
    children = list(iterate_pages(client.read_flow_runs, flow_run_filter=below, sort=order))
    # A flow run knows the task run that stands for it in its parent, and that task run knows the parent.
    links = sorted({run.parent_task_run_id for run in children if run.parent_task_run_id})
    parent_of: dict[UUID | None, UUID | None] = {}
    for start in range(0, len(links), READ_SIZE):
        chunk = filters.TaskRunFilter(id=filters.TaskRunFilterId(any_=links[start : start + READ_SIZE]))
        parent_of |= {
            link.id: link.flow_run_id for link in client.read_task_runs(task_run_filter=chunk, limit=READ_SIZE)
        }
    return [(run, str(parent_of.get(run.parent_task_run_id))) for run in children]
