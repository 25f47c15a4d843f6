"""Say why a flow run waits: read limits, queues, workers and pauses from the server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType, WorkPool, WorkQueue, WorkQueueStatus
from prefect.client.schemas.responses import DeploymentResponse, FlowRunSlotSummary
from prefect.exceptions import ObjectNotFound

from phasewise.errors import OrchestrationError
from phasewise.orchestration.batch_lock import AWAITING_BATCH
from phasewise.orchestration.deadlock import MAX_NAMED, Limits
from phasewise.orchestration.run_reads import READ_SIZE, describe_run, read_pages

#: Seconds after which a run that should have started is late; the server's own measure.
_LATE_SECONDS = 15.0


# ── what the server knows ─────────────────────────────────────────────────────────────────────────────────────────


async def read_limits(client: PrefectClient, pool: str) -> Limits:
    """Return the limits on the server of the work pool, its queues and its deployments; none when it has no such pool.

    Three reads, and one more for each 200 deployments.
    """
    try:
        work_pool = await client.read_work_pool(pool)
    except ObjectNotFound:
        return Limits()
    queues = await client.read_work_queues(work_pool_name=pool)
    of_pool = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[pool]))
    deployments = [
        deployment
        for deployment in await read_pages(client.read_deployments, work_pool_filter=of_pool)
        if _find_limit(deployment) is not None
    ]
    flows = await _read_flow_names(client, {deployment.flow_id for deployment in deployments})
    return Limits(
        pool=work_pool.concurrency_limit,
        queues={queue.name: queue.concurrency_limit for queue in queues},
        deployments={
            f"{flows[deployment.flow_id]}/{deployment.name}": _find_limit(deployment) for deployment in deployments
        },
    )


async def _read_flow_names(client: PrefectClient, flow_ids: Collection[UUID]) -> dict[UUID, str]:
    if not flow_ids:
        return {}
    flows = await read_pages(
        client.read_flows, flow_filter=filters.FlowFilter(id=filters.FlowFilterId(any_=list(flow_ids)))
    )
    return {flow.id: flow.name for flow in flows}


async def has_worker(client: PrefectClient, pool: str) -> bool:
    """Tell whether a worker of the work pool is online; False when there is no such pool."""
    online = filters.WorkerFilter(status=filters.WorkerFilterStatus(any_=["ONLINE"]))
    try:
        return bool(await client.read_workers_for_work_pool(pool, worker_filter=online))
    except ObjectNotFound:
        return False


def _find_limit(deployment: DeploymentResponse) -> int | None:
    limit = deployment.global_concurrency_limit
    return limit.limit if limit is not None and limit.active else None


async def explain_waiting(run_id: str) -> list[str]:
    """Return why the flow run *run_id* has not started, one reason a line, what to do first; never empty.

    Before the reasons a line names its phase and step, if a pipeline declares them. For a run that has started or
    ended that is said instead.

    Raises:
        OrchestrationError: the server does not know the run.
    """
    async with get_client() as client:
        try:
            run = await client.read_flow_run(UUID(run_id))
        except (ObjectNotFound, ValueError) as exc:
            raise OrchestrationError(
                f"The server does not know the flow run {run_id}.", hint="Take its id from the UI or from the report."
            ) from exc
        state, one = run.state, describe_run(run)
        place = [f'{one.name} is part of the step "{one.step}" in the phase "{one.phase}".'] if one.phase else []
        if state is None or state.type not in (StateType.SCHEDULED, StateType.PENDING):
            return [*place, f"{run.name} is not waiting: it is {state.name if state else 'without a state'}."]
        if state.type is StateType.PENDING:
            worker = run.labels.get("prefect.worker.name", "A worker")
            since = (datetime.now(UTC) - state.timestamp).total_seconds()
            return [*place, f"{worker} took it {since:.0f} s ago and is starting its process."]
        reasons = [*_explain_time(run), *await _explain_pool(client, run), *await _explain_deployment(client, run)]
    return [*place, *(reasons or ["Nothing holds it back: the next free worker takes it."]), *_describe_late(run)]


def _explain_time(run: FlowRun) -> list[str]:
    due = _seconds_until_due(run)
    if run.state is not None and run.state.name == AWAITING_BATCH:
        return [f"{run.state.message} It asks again in {max(due, 0):.0f} s."]
    if due <= 1:
        return []
    name = run.state.name if run.state is not None else None
    what = {"AwaitingRetry": "Its next attempt is due", "AwaitingConcurrencySlot": "It asks for a slot again"}
    return [f"{what.get(name or '', 'It is scheduled to start')} in {due:.0f} s."]


def _seconds_until_due(run: FlowRun) -> float:
    due = run.next_scheduled_start_time or run.expected_start_time
    return due.timestamp() - datetime.now(UTC).timestamp() if due is not None else 0.0


def _describe_late(run: FlowRun) -> list[str]:
    late = -_seconds_until_due(run)
    return [f"It is late: it was due {late:.0f} s ago."] if late > _LATE_SECONDS else []


async def _explain_pool(client: PrefectClient, run: FlowRun) -> list[str]:
    if run.work_pool_name is None or run.work_queue_name is None:
        return ["It belongs to no work queue, so no worker will ever take it. Deploy its flow to a work pool."]
    name = run.work_pool_name
    pool = await client.read_work_pool(name)
    queue = await client.read_work_queue_by_name(run.work_queue_name, work_pool_name=name)
    return [
        *_explain_paused(pool, queue),
        *await _explain_workers(client, pool, queue),
        *await _explain_limits(client, pool, queue),
    ]


def _explain_paused(pool: WorkPool, queue: WorkQueue) -> list[str]:
    reasons = []
    if pool.is_paused:
        reasons.append(f'The work pool "{pool.name}" is paused. Resume it: prefect work-pool resume {pool.name}')
    if queue.is_paused:
        resume = f"prefect work-queue resume {queue.name} --pool {pool.name}"
        reasons.append(f'The work queue "{queue.name}" is paused. Resume it: {resume}')
    return reasons


async def _explain_workers(client: PrefectClient, pool: WorkPool, queue: WorkQueue) -> list[str]:
    if not await has_worker(client, pool.name):
        return [f'No worker of the work pool "{pool.name}" is online. Start one: make start-workers N=1']
    if queue.status is WorkQueueStatus.NOT_READY:
        return [f'No worker asks for the work queue "{queue.name}". Start one that does: make start-workers N=1']
    return []


async def _explain_limits(client: PrefectClient, pool: WorkPool, queue: WorkQueue) -> list[str]:
    """Say which limits are reached, and by which runs."""
    if pool.concurrency_limit is None and queue.concurrency_limit is None:
        return []
    status = await client.read_work_pool_concurrency_status(pool.name, limit=READ_SIZE, flow_run_limit=READ_SIZE)
    reasons = []
    for detail in status.queues:
        limit = detail.concurrency_limit
        if detail.queue_name == queue.name and limit is not None and detail.active_slots >= limit:
            holders = _name_holders(detail.flow_runs, detail.active_slots)
            reasons.append(f'The limit of {limit} of the work queue "{queue.name}" is reached: {holders}.')
    if pool.concurrency_limit is not None and status.active_slots >= pool.concurrency_limit:
        holders = _name_holders([run for detail in status.queues for run in detail.flow_runs], status.active_slots)
        reasons.append(f'The limit of {pool.concurrency_limit} of the work pool "{pool.name}" is reached: {holders}.')
    return reasons


def _name_holders(runs: Sequence[FlowRunSlotSummary], total: int) -> str:
    if total == 0:
        return "it lets nothing run"
    names = [f"{run.name} ({run.state_name})" for run in runs[:MAX_NAMED]]
    more = f" and {total - len(names)} more" if total > len(names) else ""
    return f"{', '.join(names)}{more}"


async def _explain_deployment(client: PrefectClient, run: FlowRun) -> list[str]:
    if run.deployment_id is None:
        return []
    try:
        deployment = await client.read_deployment(run.deployment_id)
    except ObjectNotFound:
        return ["Its deployment was deleted. Deploy it again, then start a new run: make deploy-flows"]
    limit = deployment.global_concurrency_limit
    if limit is None or not limit.active or limit.active_slots < limit.limit:
        return []
    holders = f"{limit.active_slots} of its runs have a slot"
    return [f'The limit of {limit.limit} of its deployment "{deployment.name}" is reached: {holders}.']
