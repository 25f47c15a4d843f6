"""Cancel flow runs and everything below them, all levels at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from phasewise.orchestration.run_reads import read_children, read_runs

#: Message of a run that is cancelled because the run above it is.
CANCELLED_FROM_ABOVE = "Cancelled with the run above it."


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
