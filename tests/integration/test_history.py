from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import anyio.to_thread
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Failed, Running

from phasewise.orchestration.run_history import read_durations
from tests.integration.conftest import Runs


@flow(name="timed-etl")
def timed() -> None: ...


async def finish(runs: Runs, name: str, end: Callable[[], Any] = Completed) -> FlowRun:
    """Record a flow run of that name, without a process; return it with the time that it took."""
    run = await runs.client.create_flow_run(timed, name=name)
    for state in (Running(), end()):
        await runs.client.set_flow_run_state(run.id, state, force=True)
    return await runs.client.read_flow_run(run.id)


async def test_the_duration_of_an_item_is_the_median_of_its_last_three_runs_that_completed(runs: Runs) -> None:
    people = [await finish(runs, "timed-etl/people") for _ in range(4)]
    await finish(runs, "timed-etl/people", Failed)
    await finish(runs, "timed-etl/broken", Failed)
    await finish(runs, "something else")
    parks = await finish(runs, "timed-etl/parks/part 1")

    durations = await anyio.to_thread.run_sync(read_durations, "timed-etl")

    newest = [run.total_run_time.total_seconds() for run in people[1:]]
    assert durations == {"people": statistics.median(newest), "parks/part 1": parks.total_run_time.total_seconds()}
    assert all(seconds > 0 for seconds in durations.values())


async def test_a_flow_that_never_ran_has_no_durations(runs: Runs) -> None:
    assert runs.pool
    assert await anyio.to_thread.run_sync(read_durations, "never-ran") == {}
