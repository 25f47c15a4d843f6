"""What the server remembers of a batch: its flow runs with their times."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from phasewise.flow_runs import describe_run
from phasewise.outcomes import StepOutcome

_PAGE = 200


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
