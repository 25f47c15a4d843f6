"""The seam to Prefect's flow runs: submit many, watch them end, cancel them.

``FlowRuns`` is the protocol that the orchestrator works with; ``PrefectFlowRuns`` is its adapter to a Prefect server,
``phasewise.local.LocalFlowRuns`` the one that needs no server, ``phasewise.testing.MemoryFlowRuns`` the one for tests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar
from uuid import UUID, uuid4

import httpx
from prefect import Task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger
from prefect.states import AwaitingRetry, Cancelling, Completed, Failed, Pending, Running
from prefect.types import KeyValueLabels
from prefect.utilities.urls import url_for

from phasewise.errors import DeploymentMissing, OrchestrationError, ServerUnreachable
from phasewise.outcomes import FINAL_TYPES, StepOutcome
from phasewise.pipeline import FAN_OUT_TAG

#: Label prefix under which a flow run keeps its summary on the server.
SUMMARY_PREFIX = "phasewise."
#: Message of a run that is cancelled because the run above it is.
CANCELLED_FROM_ABOVE = "Cancelled with the run above it."

# The server takes at most 100 a call; half of it lets the first runs start while the rest is being created.
_BULK_SIZE = 50
_READ_SIZE = 200
#: Seconds; see where they are used.
_COALESCE_PAUSE = 0.05
_UNREACHABLE_PAUSE = 1.0
_CANCELLING_SECONDS = 40.0
_BUSY_PAUSES = (0.5, 1.0, 2.0, 4.0)

_NOTHING: Mapping[str, Any] = MappingProxyType({})

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A flow run that should exist."""

    #: ``flow name/deployment name``.
    deployment: str
    #: Name of the flow run; None lets the server choose one.
    name: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: Idempotency key: two requests with one key are one flow run.
    key: str | None = None
    #: Requests with one group share a node of the parent's task runs; a fan-out is one group.
    group: str | None = None


class FlowRuns(Protocol):
    """Where flow runs live."""

    async def submit(self, requests: Sequence[RunRequest]) -> list[str]:
        """Make each request's flow run exist and be on its way; return the run ids in the order of *requests*.

        A run that exists for the key and has completed, or is still on its way, is returned as it is; one that
        failed, crashed or was cancelled is scheduled again under its own id.

        Raises:
            DeploymentMissing: a deployment does not exist.
        """
        ...

    def watch(self, run_ids: Sequence[str]) -> AsyncIterator[StepOutcome]:
        """Yield the outcome of each run once, as it becomes final."""
        ...

    async def restart(self, run_ids: Collection[str]) -> None:
        """Schedule each run again, under its own id, that is final and did not complete."""
        ...

    async def cancel(self, run_ids: Collection[str]) -> None:
        """Ask each run that is not final, and everything below all of them, to end; final ones stay as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """The flow run that this code runs in, where a process tree stands in for the server (``phasewise.local``)."""

    run_id: str
    #: Where the runs below it live.
    flow_runs: FlowRuns
    #: Returns all flow runs of the batch, parents before children.
    read_runs: Callable[[], list[StepOutcome]]
    #: What ``report_summary`` was told.
    summary: dict[str, Any] = field(default_factory=dict)


#: Set while code runs below ``phasewise run --local``; None where a server records the runs, and outside of runs.
LOCAL_RUN: ContextVar[LocalRun | None] = ContextVar("LOCAL_RUN", default=None)


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
        self,
        *,
        poll_seconds: float = 15.0,
        patience_seconds: float = 90.0,
        environment: Mapping[str, str] = _NOTHING,
    ) -> None:
        self._poll_seconds = poll_seconds
        self._patience_seconds = patience_seconds
        self._job_variables = {"env": dict(environment)} if environment else {}
        self._deployment_ids: dict[str, UUID] = {}
        self._fan_outs: list[_FanOut] = []

    async def submit(self, requests: Sequence[RunRequest]) -> list[str]:
        # With a key of its own even a request without one is safe to send again.
        keyed = [replace(request, key=request.key or str(uuid4())) for request in requests]
        return await self._call(lambda client: self._submit(client, keyed))

    async def _submit(self, client: PrefectClient, requests: Sequence[RunRequest]) -> list[str]:
        for deployment in dict.fromkeys(request.deployment for request in requests):
            await self._find_deployment(client, deployment)
        known = await _read_by_key(client, [request.key for request in requests if request.key])
        known = await _settle_cancelling(client, known)
        await asyncio.gather(*(_restart(client, run) for run in known.values() if _must_restart(run)))
        missing = [request for request in requests if request.key not in known]
        sizes = Counter(map(_group, requests))
        linked = [request for request in requests if request.key not in known or sizes[_group(request)] > 1]
        links = await _link_to_parent(client, linked)
        created = iter(await self._create(client, missing, links))
        run_ids = [str(known[r.key].id) if r.key in known else next(created) for r in requests]
        self._fan_outs += _find_fan_outs(requests, links, run_ids)
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
                    _describe(requests[index], links.get(_group(requests[index])), index, self._job_variables)
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


async def watch_runs(
    run_ids: Sequence[str],
    *,
    read: Callable[[Sequence[str]], Awaitable[Sequence[StepOutcome]]],
    listen: Callable[[asyncio.Queue[str | None]], Coroutine[Any, Any, None]],
    poll_seconds: float,
) -> AsyncIterator[StepOutcome]:
    """Yield the outcome of each run once, as it becomes final.

    A hint (an event) says which run to look at; *read* says what is true. So a lost, doubled, reordered or late
    event can neither invent a result nor lose one: at worst the slow clock (*poll_seconds*) finds it. *listen* puts
    run ids into the queue it gets, and None whenever it may have missed some.
    """
    pending = dict.fromkeys(run_ids)
    hints: asyncio.Queue[str | None] = asyncio.Queue()
    listener = asyncio.create_task(listen(hints))
    try:
        suspects = list(pending)
        while pending:
            if len(suspects) == len(pending):
                # Only a read of all winds the slow clock up again: while events about others keep coming, a run
                # whose own event was lost must not wait for the last of them.
                look_at = asyncio.get_running_loop().time() + poll_seconds
            try:
                outcomes = await read(suspects)
            except httpx.HTTPError as exc:
                get_logger("phasewise.flow_runs").warning("Could not read flow runs (%s).", type(exc).__name__)
                await asyncio.sleep(_UNREACHABLE_PAUSE)
                suspects = list(pending)
                continue
            for outcome in outcomes:
                if outcome.is_final and outcome.run_id in pending:
                    del pending[outcome.run_id]
                    yield outcome
            if pending:
                suspects = await _next_suspects(hints, pending, look_at)
    finally:
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener


async def _next_suspects(hints: asyncio.Queue[str | None], pending: Collection[str], look_at: float) -> list[str]:
    """Return the runs that hints named, or all that are pending at *look_at* (the loop's time) or on a reconnect."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            async with asyncio.timeout_at(look_at):
                named = {await hints.get()}
        except TimeoutError:
            return list(pending)
        await asyncio.sleep(_coalesce_pause(len(pending)))
        while not hints.empty():
            named.add(hints.get_nowait())
        is_due = None in named or loop.time() >= look_at
        suspects = list(pending) if is_due else [run_id for run_id in pending if run_id in named]
        if suspects:
            return suspects


def _coalesce_pause(pending: int) -> float:
    """Return the seconds in which events are gathered for one read: siblings tend to end together.

    Longer where many are pending, of which some always end: it bounds the reads by the time that the runs take, to one
    a second as long as 100 are pending. A parent has nothing to do with a single one of so many.
    """
    return min(max(_COALESCE_PAUSE, pending / 100), 1.0)


async def _listen(run_ids: Sequence[str], hints: asyncio.Queue[str | None]) -> None:
    """Put the id of each run that became final into *hints*, and None after each (re)connect."""
    pause = _COALESCE_PAUSE
    while True:
        try:
            # The subscriber's own reconnects would hide the gap in which events were lost.
            subscriber = get_events_subscriber(filter=_final_events(run_ids), reconnection_attempts=0)
            async with AsyncExitStack() as stack:
                # Before it connects: cancelled between that and the server's answer it would leave its socket open.
                stack.push_async_exit(subscriber)
                await subscriber.__aenter__()
                hints.put_nowait(None)
                pause = _COALESCE_PAUSE
                async for event in subscriber:
                    hints.put_nowait(event.resource.id.removeprefix("prefect.flow-run."))
        except Exception as exc:  # noqa: BLE001 - whatever ended the socket, we connect again; the slow read goes on
            get_logger("phasewise.flow_runs").debug("Events subscription ended: %s", exc)
        await asyncio.sleep(pause)
        pause = min(pause * 2, 5.0)


async def cancel_runs(client: PrefectClient, run_ids: Collection[UUID]) -> list[UUID]:
    """Cancel the runs that are not final, and everything below all of *run_ids*; return those that were asked to end.

    All levels at once: a grandchild does not wait until its parent has ended.
    """
    runs = await read_runs(client, run_ids)
    return await _cancel_level(client, runs) + await cancel_below(client, [run.id for run in runs])


async def cancel_below(
    client: PrefectClient, run_ids: Sequence[UUID], *, on_asked: Callable[[UUID], None] = lambda _: None
) -> list[UUID]:
    """Cancel everything below *run_ids* that is not final, as ``cancel_runs`` does; *on_asked* is told each at once."""
    asked: list[UUID] = []
    while run_ids:
        level = await read_children(client, run_ids)
        asked += await _cancel_level(client, level, on_asked)
        run_ids = [run.id for run in level]
    return asked


async def _cancel_level(
    client: PrefectClient, runs: Sequence[FlowRun], on_asked: Callable[[UUID], None] = lambda _: None
) -> list[UUID]:
    async def cancel(run: FlowRun) -> None:
        with suppress(ObjectNotFound):  # deleted meanwhile
            await client.set_flow_run_state(run.id, Cancelling(message=CANCELLED_FROM_ABOVE))
        on_asked(run.id)

    living = [run for run in runs if run.state and not run.state.is_final() and not run.state.is_cancelling()]
    # Of thousands of children the few that have a process must not wait for the others' turn.
    living.sort(key=lambda run: run.state is not None and run.state.is_scheduled())
    await asyncio.gather(*(cancel(run) for run in living))
    return [run.id for run in living]


async def read_children(client: PrefectClient, parents: Sequence[UUID]) -> list[FlowRun]:
    """Return the flow runs directly below *parents*."""
    runs: list[FlowRun] = []
    parent_filter = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=list(parents)))
    while True:
        page = await client.read_flow_runs(
            flow_run_filter=parent_filter, limit=_READ_SIZE, offset=len(runs), sort=FlowRunSort.ID_DESC
        )
        runs += page
        if len(page) < _READ_SIZE:
            return runs


def report_summary(summary: Mapping[str, Any]) -> None:
    """Keep small results (numbers, short texts) of the current flow run on the server, for its parent to read.

    They travel as labels of the flow run, so no result storage has to be shared between machines. Outside of a flow
    run this does nothing.
    """
    small = {key: value for key, value in summary.items() if isinstance(value, (str, int, float, bool))}
    if (local := LOCAL_RUN.get()) is not None:
        local.summary.update(small)
        return
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    labels: KeyValueLabels = {f"{SUMMARY_PREFIX}{key}": value for key, value in small.items()}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(context.flow_run.id, labels)


def current_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the current flow run, or the package's own outside of one."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return get_logger("phasewise")
    from prefect.logging.loggers import flow_run_logger

    return flow_run_logger(context.flow_run, context.flow)


def _group(request: RunRequest) -> str:
    """Return what names the node of *request* among the task runs of its parent; each of ``_submit`` has a key."""
    return request.group or request.key or request.deployment


async def _link_to_parent(client: PrefectClient, requests: Sequence[RunRequest]) -> dict[str, UUID]:
    """Return for each group the task run of the current flow run that stands for it, creating what is missing.

    The server nests a child below the flow run of its parent task run. A fan-out needs only one of them: the graph
    draws every flow run that points to it. The dynamic key is the group, so a retry finds the one it made before.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return {}
    links: dict[str, UUID] = {}
    for group, count in Counter(map(_group, requests)).items():
        deployment = next(request.deployment for request in requests if _group(request) == group)
        task: Task[..., None] = Task(name=deployment, fn=_stand_in)
        link = await client.create_task_run(
            task,
            flow_run_id=context.flow_run.id,
            dynamic_key=group,
            name=deployment,
            state=Running() if count > 1 else Pending(),
            extra_tags=[FAN_OUT_TAG] if count > 1 else [],
        )
        links[group] = link.id
        if count > 1 and link.state is not None and link.state.is_final():
            await client.set_task_run_state(link.id, Running(), force=True)
    return links


def _stand_in() -> None:
    """The body of the task run that stands for a child; the child's own states are copied to it by the server."""


def _find_fan_outs(requests: Sequence[RunRequest], links: Mapping[str, UUID], run_ids: Sequence[str]) -> list[_FanOut]:
    members: dict[str, list[str]] = {group: [] for group in links}
    for request, run_id in zip(requests, run_ids, strict=True):
        members.setdefault(_group(request), []).append(run_id)
    return [_FanOut(links[group], frozenset(ids)) for group, ids in members.items() if group in links and len(ids) > 1]


@dataclass
class _FanOut:
    """The task run that stands for a whole fan-out, and what is known of its flow runs.

    The server copies each state of a child to its parent's task run: of twenty children, forty states that replace
    each other. Ours leaves that to the parent (``phasewise.statements``), which says once how all of them have ended.
    """

    link: UUID
    run_ids: frozenset[str]
    _completed: dict[str, bool] = field(default_factory=dict)

    async def note(self, outcome: StepOutcome, client: PrefectClient) -> None:
        """Note how a run has ended; after the last one, set the state of the task run."""
        if outcome.run_id not in self.run_ids:
            return
        self._completed[outcome.run_id] = outcome.is_completed
        if len(self._completed) < len(self.run_ids):
            return
        failed = list(self._completed.values()).count(False)
        if failed:
            await self._say(Failed(message=f"{failed} of {len(self.run_ids)} flow runs did not complete."), client)
        else:
            await self._say(Completed(message=f"All {len(self.run_ids)} flow runs completed."), client)

    async def reopen(self, run_ids: Collection[str], client: PrefectClient) -> None:
        """Forget how runs have ended that are run again."""
        if again := self.run_ids.intersection(run_ids):
            for run_id in again:
                self._completed.pop(run_id, None)
            await self._say(Running(), client)

    async def _say(self, state: State[None], client: PrefectClient) -> None:
        try:
            await client.set_task_run_state(self.link, state, force=True)
        except httpx.HTTPError as exc:  # what it shows is also to be seen of the flow runs
            get_logger("phasewise.flow_runs").warning("Could not update the task run of a fan-out: %s", exc)


def _describe(
    request: RunRequest, parent: UUID | None, rank: int, job_variables: Mapping[str, Any] = _NOTHING
) -> dict[str, Any]:
    # Workers take the earliest first: a microsecond apart, runs start in the order of the requests.
    scheduled = (datetime.now(UTC) + timedelta(microseconds=rank)).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": scheduled}}
    body: dict[str, Any] = {"parameters": dict(request.parameters), "state": state}
    optional: dict[str, Any] = {
        "name": request.name,
        "idempotency_key": request.key,
        "parent_task_run_id": parent and str(parent),
        "job_variables": dict(job_variables),
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


async def _read_by_key(client: PrefectClient, keys: Sequence[str]) -> dict[str, FlowRun]:
    runs: list[FlowRun] = []
    for start in range(0, len(keys), _READ_SIZE):
        key_filter = FlowRunFilterIdempotencyKey(any_=list(keys[start : start + _READ_SIZE]))
        runs += await client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=key_filter), limit=_READ_SIZE)
    return {run.idempotency_key: run for run in runs if run.idempotency_key}


async def read_runs(client: PrefectClient, run_ids: Collection[str] | Collection[UUID]) -> list[FlowRun]:
    """Return the flow runs that the server knows of *run_ids*, in no order; a read for each 200."""
    ids = [UUID(str(run_id)) for run_id in run_ids]
    runs: list[FlowRun] = []
    for start in range(0, len(ids), _READ_SIZE):
        id_filter = FlowRunFilterId(any_=ids[start : start + _READ_SIZE])
        runs += await client.read_flow_runs(flow_run_filter=FlowRunFilter(id=id_filter), limit=_READ_SIZE)
    return runs


async def _settle_cancelling(client: PrefectClient, known: dict[str, FlowRun]) -> dict[str, FlowRun]:
    """Wait until runs that are being cancelled are final: only then can they be scheduled again."""
    deadline = time.monotonic() + _CANCELLING_SECONDS
    while any(run.state and run.state.is_cancelling() for run in known.values()) and time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        known = await _read_by_key(client, list(known))
    return known


def _must_restart(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final() and run.state.type is not StateType.COMPLETED


async def _restart(client: PrefectClient, run: FlowRun) -> None:
    await client.set_flow_run_state(run.id, AwaitingRetry(message="Scheduled again by its parent."), force=True)


def _final_events(run_ids: Sequence[str]) -> EventFilter:
    return EventFilter(
        event=EventNameFilter(prefix=["prefect.flow-run."]),
        resource=EventResourceFilter(
            id=[f"prefect.flow-run.{run_id}" for run_id in run_ids],
            labels={"prefect.state-type": list(FINAL_TYPES)},
        ),
    )


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
        parent_id=parent_id,
        url=url_for(run),
        summary=summary,
    )


def _lost(run_id: str) -> StepOutcome:
    return StepOutcome(
        name=run_id, run_id=run_id, state_type="LOST", state_name="Lost", message="The server does not know this run."
    )
