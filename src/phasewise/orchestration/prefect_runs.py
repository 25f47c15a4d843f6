"""``FlowRuns`` on a Prefect server: create runs in bulk, one key each, so that asking again finds what exists."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry

from phasewise.errors import DeploymentMissing, OrchestrationError, ServerUnreachable
from phasewise.orchestration.cancel import cancel_runs
from phasewise.orchestration.fan_out_link import FanOutLink, find_fan_outs, group_of, link_to_parent
from phasewise.orchestration.flow_runs import LOCAL_RUN, FlowRuns, RunRequest
from phasewise.orchestration.run_reads import ITEM_LABEL, PHASE_LABEL, STEP_LABEL, describe_run, read_by_key, read_runs
from phasewise.orchestration.watch import _listen, watch_runs
from phasewise.outcomes import StepOutcome

# The server takes at most 100 a call; half of it lets the first runs start while the rest is being created.
_BULK_SIZE = 50
_CANCELLING_SECONDS = 40.0
_BUSY_PAUSES = (0.5, 1.0, 2.0, 4.0)

_NOTHING: Mapping[str, Any] = MappingProxyType({})

R = TypeVar("R")


def current_flow_runs(*, poll_seconds: float = 15.0, environment: Mapping[str, str] = _NOTHING) -> FlowRuns:
    """Return where flow runs live that are triggered now: in this process tree, or on the server of the settings."""
    local = LOCAL_RUN.get()
    if local is not None:
        return local.flow_runs
    return PrefectFlowRuns(poll_seconds=poll_seconds, environment=environment)


class PrefectFlowRuns:
    """Flow runs on the Prefect server of the current settings.

    Inside a flow the runs become its children: linked to it, so that the UI nests them. A server that does not
    answer is waited for: *patience_seconds* in calls that change something, without end while watching.

    *environment* is set for each run that is created, over what its deployment says; it must hold no secrets.
    """

    def __init__(
        self, *, poll_seconds: float = 15.0, patience_seconds: float = 90.0, environment: Mapping[str, str] = _NOTHING
    ) -> None:
        self._poll_seconds = poll_seconds
        self._patience_seconds = patience_seconds
        self._job_variables = {"env": dict(environment)} if environment else {}
        self._deployment_ids: dict[str, UUID] = {}
        self._fan_outs: list[FanOutLink] = []

    async def submit(self, requests: Sequence[RunRequest]) -> list[str]:
        # With a key of its own even a request without one is safe to send again.
        keyed = [replace(request, key=request.key or str(uuid4())) for request in requests]
        return await self._call(lambda client: self._submit(client, keyed))

    async def _submit(self, client: PrefectClient, requests: Sequence[RunRequest]) -> list[str]:
        for deployment in dict.fromkeys(request.deployment for request in requests):
            await self._find_deployment(client, deployment)
        known = await read_by_key(client, [request.key for request in requests if request.key])
        known = await _settle_cancelling(client, known)
        await asyncio.gather(*(_restart(client, run) for run in known.values() if _must_restart(run)))
        missing = [request for request in requests if request.key not in known]
        sizes = Counter(map(group_of, requests))
        linked = [request for request in requests if request.key not in known or sizes[group_of(request)] > 1]
        links = await link_to_parent(client, linked)
        created = iter(await self._create(client, missing, links))
        run_ids = [str(known[r.key].id) if r.key in known else next(created) for r in requests]
        self._fan_outs += find_fan_outs(requests, links, run_ids)
        return run_ids

    async def _find_deployment(self, client: PrefectClient, name: str) -> UUID:
        if name not in self._deployment_ids:
            try:
                self._deployment_ids[name] = (await client.read_deployment_by_name(name)).id
            except ObjectNotFound as exc:
                raise DeploymentMissing(
                    f'The deployment "{name}" does not exist on {client.api_url}.', hint="Create it: make deploy-flows"
                ) from exc
        return self._deployment_ids[name]

    async def _create(
        self, client: PrefectClient, requests: Sequence[RunRequest], links: Mapping[str, UUID]
    ) -> list[str]:
        """Create the runs in bulk, per deployment, and return their ids in the order of *requests*."""
        run_ids: dict[int, str] = {}
        for deployment in dict.fromkeys(request.deployment for request in requests):
            mine = [index for index, request in enumerate(requests) if request.deployment == deployment]
            for start in range(0, len(mine), _BULK_SIZE):
                chunk = mine[start : start + _BULK_SIZE]
                bodies = [
                    _describe(requests[index], links.get(group_of(requests[index])), index, self._job_variables)
                    for index in chunk
                ]
                created = await _create_bulk(client, self._deployment_ids[deployment], bodies)
                run_ids.update(zip(chunk, created, strict=True))
        return [run_ids[index] for index in range(len(requests))]

    async def watch(self, run_ids: Sequence[str]) -> AsyncIterator[StepOutcome]:
        async with get_client() as client:

            async def read(wanted: Sequence[str]) -> list[StepOutcome]:
                runs = {str(run.id): run for run in await read_runs(client, wanted)}
                return [describe_run(runs[run_id]) if run_id in runs else _lost(run_id) for run_id in wanted]

            listen = partial(_listen, run_ids)
            async for outcome in watch_runs(run_ids, read=read, listen=listen, poll_seconds=self._poll_seconds):
                for fan_out in self._fan_outs:
                    await fan_out.note(outcome, client)
                yield outcome

    async def restart(self, run_ids: Collection[str]) -> None:
        async def restart(client: PrefectClient) -> None:
            runs = await read_runs(client, run_ids)
            await asyncio.gather(*(_restart(client, run) for run in runs if _must_restart(run)))
            for fan_out in self._fan_outs:
                await fan_out.reopen(run_ids, client)

        await self._call(restart)

    async def cancel(self, run_ids: Collection[str]) -> None:
        await self._call(lambda client: cancel_runs(client, [UUID(run_id) for run_id in run_ids]))

    async def _call(self, call: Callable[[PrefectClient], Awaitable[R]]) -> R:
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                async with get_client() as client:
                    return await call(client)
            except httpx.TransportError as exc:
                if time.monotonic() > deadline:
                    raise ServerUnreachable(
                        f"The Prefect server did not answer for {self._patience_seconds:g} s ({type(exc).__name__}).",
                        hint="Start it again (make up), then retry this run: what completed is not run again.",
                    ) from exc
                await asyncio.sleep(1)


def _describe(
    request: RunRequest, parent: UUID | None, rank: int, job_variables: Mapping[str, Any] = _NOTHING
) -> dict[str, Any]:
    # Workers take the earliest first: a microsecond apart, runs start in the order of the requests.
    scheduled = (datetime.now(UTC) + timedelta(microseconds=rank)).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": scheduled}}
    body: dict[str, Any] = {"parameters": dict(request.parameters), "state": state}
    labels = {PHASE_LABEL: request.phase, STEP_LABEL: request.step, ITEM_LABEL: request.item}
    optional: dict[str, Any] = {
        "name": request.name,
        "idempotency_key": request.key,
        "parent_task_run_id": parent and str(parent),
        "job_variables": dict(job_variables),
        "labels": {label: value for label, value in labels.items() if value is not None},
    }
    return body | {key: value for key, value in optional.items() if value}


async def _create_bulk(client: PrefectClient, deployment_id: UUID, bodies: list[dict[str, Any]]) -> list[str]:
    # The path is a format string of the client's typed routes; this route is younger than that list.
    path: Any = f"/deployments/{deployment_id}/create_flow_run/bulk"
    for pause in (*_BUSY_PAUSES, None):
        response = await client.request("POST", path, json=bodies)
        response.raise_for_status()
        results = response.json()["results"]
        refused = [
            (body, result) for body, result in zip(bodies, results, strict=True) if result["status"] != "CREATED"
        ]
        if not refused:
            break
        body, result = refused[0]
        # A stock server on SQLite says so run by run, under a status of success. All have keys: asking again is safe.
        if pause is None or "database is locked" not in str(result["error"]):
            raise OrchestrationError(f"The server refused the flow run {body.get('name', '')}: {result['error']}")
        await asyncio.sleep(pause)
    return [result["flow_run_id"] for result in results]


async def _settle_cancelling(client: PrefectClient, known: dict[str, FlowRun]) -> dict[str, FlowRun]:
    """Wait until runs that are being cancelled are final: only then can they be scheduled again."""
    deadline = time.monotonic() + _CANCELLING_SECONDS
    while any(run.state and run.state.is_cancelling() for run in known.values()) and time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        known = await read_by_key(client, list(known))
    return known


def _must_restart(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final() and run.state.type is not StateType.COMPLETED


async def _restart(client: PrefectClient, run: FlowRun) -> None:
    await client.set_flow_run_state(run.id, AwaitingRetry(message="Scheduled again by its parent."), force=True)


def _lost(run_id: str) -> StepOutcome:
    return StepOutcome(
        name=run_id, run_id=run_id, state_type="LOST", state_name="Lost", message="The server does not know this run."
    )
