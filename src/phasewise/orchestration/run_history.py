"""What the server remembers of past batches: their flow runs with their times."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from phasewise.orchestration.run_reads import describe_run
from phasewise.outcomes import StepOutcome

_PAGE = 200
#: How many batches the duration of an item is the median of.
_BATCHES = 3


def read_batch_runs(run_id: str) -> list[StepOutcome]:
    """Return the flow run *run_id* and all flow runs below it, parents before children, at any depth.

    Empty when the server does not know the run. Two reads per level and 200 runs.
    """
    with get_client(sync_client=True) as client:
        root = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run_id)])))
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
    Three, so that one night on a busy machine does not decide the next. Items that never completed are missing.
    """
    seconds: dict[str, list[float]] = {}
    for run in islice(_read_completed(flow_name), max_runs):
        _, _, item = run.name.partition(f"{flow_name}/")
        if item:
            seconds.setdefault(item, []).append(run.total_run_time.total_seconds())
    return {item: statistics.median(newest_first[:_BATCHES]) for item, newest_first in seconds.items()}


def _read_completed(flow_name: str) -> Iterator[FlowRun]:
    """Yield the completed runs of a flow, those that ended last first; reads no further than it is asked to."""
    completed = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED])))
    offset = 0
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            flow_run_filter=completed,
            sort=FlowRunSort.END_TIME_DESC,
            limit=_PAGE,
            offset=offset,
        ):
            yield from page
            if len(page) < _PAGE:
                return
            offset += _PAGE


def _read_children(client: SyncPrefectClient, parents: Sequence[UUID]) -> list[tuple[FlowRun, str]]:
    """Return the children of *parents*, each with its parent's run id."""
    children = _read_pages(client, FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=list(parents))))
    # A flow run knows the task run that stands for it in its parent, and that task run knows the parent.
    links = sorted({run.parent_task_run_id for run in children if run.parent_task_run_id})
    parent_of: dict[UUID | None, UUID | None] = {}
    for start in range(0, len(links), _PAGE):
        link_filter = TaskRunFilter(id=TaskRunFilterId(any_=links[start : start + _PAGE]))
        parent_of |= {
            link.id: link.flow_run_id for link in client.read_task_runs(task_run_filter=link_filter, limit=_PAGE)
        }
    return [(run, str(parent_of.get(run.parent_task_run_id))) for run in children]


def _read_pages(client: SyncPrefectClient, run_filter: FlowRunFilter) -> list[FlowRun]:
    runs: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_run_filter=run_filter,
            limit=_PAGE,
            offset=len(runs),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        )
        runs += page
        if len(page) < _PAGE:
            return runs
