"""Read flow runs from the server in pages, and describe them as outcomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Pending
from prefect.utilities.urls import url_for

from phasewise.outcomes import StepOutcome

#: Label prefix under which a flow run keeps its summary on the server.
SUMMARY_PREFIX = "phasewise."
#: Labels of a flow run: what it is for in the pipeline.
PHASE_LABEL, STEP_LABEL, ITEM_LABEL = "phasewise-phase", "phasewise-step", "phasewise-item"
READ_SIZE = 200

T = TypeVar("T")


async def read_pages(read: Callable[..., Awaitable[list[T]]], **query: Any) -> list[T]:
    """Return all that *read*, one of the client's methods, finds with *query*: 200 a call."""
    found: list[T] = []
    while len(found) % READ_SIZE == 0:
        page = await read(**query, limit=READ_SIZE, offset=len(found))
        if not page:
            break
        found += page
    return found


def iterate_pages(read: Callable[..., list[T]], **query: Any) -> Iterator[T]:
    """Yield what ``read_pages`` returns, with a client that is not async; reads no further than it is asked to."""
    count = 0
    while count % READ_SIZE == 0:
        page = read(**query, limit=READ_SIZE, offset=count)
        if not page:
            break
        yield from page
        count += len(page)


def of_types(types: Collection[StateType]) -> filters.FlowRunFilter:
    """Return the filter of the runs whose state is of one of *types*; without any, of all runs."""
    chosen = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=list(types))) if types else None
    return filters.FlowRunFilter(state=chosen)


async def read_children(client: PrefectClient, parents: Sequence[UUID]) -> list[FlowRun]:
    """Return the flow runs directly below *parents*."""
    below = filters.FlowRunFilter(parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=list(parents)))
    return await read_pages(client.read_flow_runs, flow_run_filter=below, sort=FlowRunSort.ID_DESC)


async def read_by_key(client: PrefectClient, keys: Sequence[str]) -> dict[str, FlowRun]:
    runs: list[FlowRun] = []
    for start in range(0, len(keys), READ_SIZE):
        key_filter = filters.FlowRunFilterIdempotencyKey(any_=list(keys[start : start + READ_SIZE]))
        runs += await client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(idempotency_key=key_filter), limit=READ_SIZE
        )
    return {run.idempotency_key: run for run in runs if run.idempotency_key}


async def read_runs(client: PrefectClient, run_ids: Collection[str] | Collection[UUID]) -> list[FlowRun]:
    """Return the flow runs that the server knows of *run_ids*, in no order; a read for each 200."""
    ids = [UUID(str(run_id)) for run_id in run_ids]
    runs: list[FlowRun] = []
    for start in range(0, len(ids), READ_SIZE):
        id_filter = filters.FlowRunFilterId(any_=ids[start : start + READ_SIZE])
        runs += await client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(id=id_filter), limit=READ_SIZE)
    return runs


def describe_run(run: FlowRun, *, parent_id: str | None = None) -> StepOutcome:
    """Return what the server says about *run*, which need not be final."""
    state = run.state or Pending()
    summary = {
        key.removeprefix(SUMMARY_PREFIX): value for key, value in run.labels.items() if key.startswith(SUMMARY_PREFIX)
    }
    return StepOutcome(
        name=run.name,
        run_id=str(run.id),
        state_type=state.type.value,
        state_name=state.name or state.type.value.title(),
        message=(state.message or "").removeprefix("Flow run encountered an exception: "),
        expected_at=run.expected_start_time,
        started_at=run.start_time,
        ended_at=run.end_time,
        seconds=run.total_run_time.total_seconds() if state.is_final() else None,
        attempts=run.run_count,
        phase=_read_label(run, PHASE_LABEL),
        step=_read_label(run, STEP_LABEL),
        item=_read_label(run, ITEM_LABEL),
        parent_id=parent_id,
        url=url_for(run),
        summary=summary,
    )


def _read_label(run: FlowRun, label: str) -> str | None:
    return str(run.labels[label]) if label in run.labels else None
