"""Watch flow runs end: events say which run to look at, a read of its state says what is true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import httpx
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.logging import get_logger

from phasewise.outcomes import FINAL_TYPES, StepOutcome

#: Seconds; see where they are used.
_COALESCE_PAUSE = 0.05
_UNREACHABLE_PAUSE = 1.0


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
                get_logger("phasewise.orchestration.flow_runs").warning(
                    "Could not read flow runs (%s).", type(exc).__name__
                )
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

    Longer where many are pending and some always end: it bounds the reads by the time that the runs take, to one
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
        except Exception as exc:  # noqa: BLE001 - whatever ended the socket, we connect again; the slow read continues
            get_logger("phasewise.orchestration.flow_runs").debug("Events subscription ended: %s", exc)
        await asyncio.sleep(pause)
        pause = min(pause * 2, 5.0)


def _final_events(run_ids: Sequence[str]) -> EventFilter:
    return EventFilter(
        event=EventNameFilter(prefix=["prefect.flow-run."]),
        resource=EventResourceFilter(
            id=[f"prefect.flow-run.{run_id}" for run_id in run_ids], labels={"prefect.state-type": list(FINAL_TYPES)}
        ),
    )
