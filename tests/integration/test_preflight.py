from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, FlowRun
from prefect.states import Pending, Running, Scheduled

from phasewise.errors import OrchestrationError
from phasewise.orchestration.deadlock import Limits
from phasewise.orchestration.diagnose import explain_waiting, read_limits
from phasewise.orchestration.run_reads import PHASE_LABEL, STEP_LABEL
from tests.integration.conftest import Runs


@dataclass(frozen=True, kw_only=True)
class Idle:
    """A work pool that no worker looks at, with one queue and one deployment."""

    runs: Runs
    pool: str
    queue: UUID
    deployment: UUID

    async def schedule(self, name: str, *, seconds: float = 0, labels: Any = None) -> FlowRun:
        state: Any = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(seconds=seconds))
        return await self.runs.client.create_flow_run_from_deployment(
            self.deployment, name=name, state=state, labels=labels
        )

    async def start(self, name: str) -> FlowRun:
        run = await self.schedule(name)
        await self.runs.client.set_flow_run_state(run.id, Running(), force=True)
        return run


@pytest.fixture
async def idle(runs: Runs) -> Idle:
    name = f"idle-{uuid.uuid4().hex[:8]}"
    await runs.client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    queue = await runs.client.create_work_queue("tables", work_pool_name=name)
    deployment = await runs.client.create_deployment(
        flow_id=await runs.client.create_flow_from_name(f"flow-{name}"),
        name="d",
        work_pool_name=name,
        work_queue_name="tables",
        entrypoint="flows.py:none",
    )
    return Idle(runs=runs, pool=name, queue=queue.id, deployment=deployment)


async def test_a_pool_without_a_worker_is_named(idle: Idle) -> None:
    run = await idle.schedule("people")

    assert await explain_waiting(str(run.id)) == [
        f'No worker of the work pool "{idle.pool}" is online. Start one: make start-workers N=1'
    ]


async def test_the_phase_and_the_step_that_a_run_is_part_of_are_named_first(idle: Idle) -> None:
    run = await idle.schedule("people", labels={PHASE_LABEL: "tables", STEP_LABEL: "process_table_etl"})

    reasons = await explain_waiting(str(run.id))

    assert reasons[0] == 'people is part of the step "process_table_etl" in the phase "tables".'
    assert len(reasons) > 1


async def test_what_is_paused_is_named_with_the_command_that_resumes_it(idle: Idle) -> None:
    run = await idle.schedule("people")
    await idle.runs.client.update_work_queue(idle.queue, is_paused=True)
    await idle.runs.client.update_work_pool(idle.pool, WorkPoolUpdate(is_paused=True))

    reasons = await explain_waiting(str(run.id))

    assert f'The work pool "{idle.pool}" is paused. Resume it: prefect work-pool resume {idle.pool}' in reasons
    assert (
        f'The work queue "tables" is paused. Resume it: prefect work-queue resume tables --pool {idle.pool}' in reasons
    )


async def test_a_limit_that_is_reached_is_named_with_the_runs_that_hold_its_slots(idle: Idle) -> None:
    await idle.start("parks")
    run = await idle.schedule("people")
    await idle.runs.client.update_work_queue(idle.queue, concurrency_limit=1)
    await idle.runs.client.update_work_pool(idle.pool, WorkPoolUpdate(concurrency_limit=1))

    reasons = await explain_waiting(str(run.id))

    assert 'The limit of 1 of the work queue "tables" is reached: parks (Running).' in reasons
    assert f'The limit of 1 of the work pool "{idle.pool}" is reached: parks (Running).' in reasons


async def test_only_some_of_many_holders_are_named(idle: Idle) -> None:
    for number in range(7):
        await idle.start(f"t{number}")
    run = await idle.schedule("people")
    await idle.runs.client.update_work_queue(idle.queue, concurrency_limit=7)

    assert any("and 2 more." in reason for reason in await explain_waiting(str(run.id)))


async def test_a_limit_with_free_slots_is_no_reason(idle: Idle) -> None:
    await idle.start("parks")
    run = await idle.schedule("people")
    await idle.runs.client.update_work_queue(idle.queue, concurrency_limit=2)

    assert not any("limit" in reason for reason in await explain_waiting(str(run.id)))


async def test_a_run_that_is_scheduled_for_later_says_when(idle: Idle) -> None:
    run = await idle.schedule("people", seconds=600)

    reasons = await explain_waiting(str(run.id))

    assert reasons[0] in ("It is scheduled to start in 600 s.", "It is scheduled to start in 599 s.")


async def test_a_run_that_should_have_started_long_ago_is_called_late(idle: Idle) -> None:
    run = await idle.schedule("people", seconds=-90)

    reasons = await explain_waiting(str(run.id))

    assert "No worker" in reasons[0]
    assert reasons[-1].startswith("It is late: it was due 9")


async def test_a_run_that_a_worker_has_taken_says_so(idle: Idle) -> None:
    run = await idle.schedule("people")
    await idle.runs.client.set_flow_run_state(run.id, Pending(), force=True)

    [reason] = await explain_waiting(str(run.id))

    assert "took it 0 s ago and is starting its process" in reason


async def test_a_run_that_does_not_wait_says_what_it_does(idle: Idle) -> None:
    run = await idle.start("people")

    assert await explain_waiting(str(run.id)) == ["people is not waiting: it is Running."]


async def test_a_run_that_nobody_knows_is_an_error(idle: Idle) -> None:
    for unknown in (str(uuid.uuid4()), "not-an-id"):
        with pytest.raises(OrchestrationError, match=f"does not know the flow run {unknown}"):
            await explain_waiting(unknown)
    assert idle.pool


async def test_the_limits_of_a_pool_its_queues_and_deployments_are_read(idle: Idle) -> None:
    client = idle.runs.client
    await client.update_work_queue(idle.queue, concurrency_limit=3)
    await client.update_work_pool(idle.pool, WorkPoolUpdate(concurrency_limit=9))
    await client.create_deployment(
        flow_id=await client.create_flow_from_name("limited"),
        name="d",
        work_pool_name=idle.pool,
        concurrency_limit=ConcurrencyLimitConfig(limit=2).limit,
    )

    limits = await read_limits(client, idle.pool)

    assert limits == Limits(pool=9, queues={"default": None, "tables": 3}, deployments={"limited/d": 2})


async def test_a_pool_that_does_not_exist_has_no_limits(idle: Idle) -> None:
    assert await read_limits(idle.runs.client, "no-such-pool") == Limits()
