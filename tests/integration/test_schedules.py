"""Schedules have runs, and those run: Prefect's scheduler works in our server, on our database, for our worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from phasewise.orchestration.deployments import BUILT_IN, deploy
from phasewise.settings import Settings
from tests.integration.conftest import Runs

#: The first of them starts the stack.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def main_etl(runs: Runs) -> AsyncIterator[UUID]:
    """The deployment ``main-etl-deployment``, with the other six; other tests of the stack do not find them."""
    await deploy(BUILT_IN, pool=runs.pool, settings=Settings())
    ids = [(await runs.client.read_deployment_by_name(planned.full_name)).id for planned in BUILT_IN]
    yield ids[0]
    for deployment in ids:
        await runs.client.delete_deployment(deployment)


async def until_scheduled(runs: Runs, deployment: UUID, *, least: int, seconds: float = 30) -> list[FlowRun]:
    """Return the runs of *deployment* as soon as there are *least*, the earliest first."""
    only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    deadline = time.monotonic() + seconds
    while len(found := await runs.client.read_flow_runs(deployment_filter=only)) < least:
        assert time.monotonic() < deadline, f"the schedule has {len(found)} runs after {seconds} seconds"
        await asyncio.sleep(0.2)
    return sorted(found, key=lambda run: run.expected_start_time or datetime.max.replace(tzinfo=UTC))


async def test_a_cron_schedule_of_main_etl_has_runs(runs: Runs, main_etl: UUID) -> None:
    berlin = ZoneInfo("Europe/Berlin")
    nightly = CronSchedule(cron="0 2 * * *", timezone=berlin.key)

    await runs.client.create_deployment_schedules(main_etl, [(nightly, True)])
    scheduled = await until_scheduled(runs, main_etl, least=3)

    nights = [run.expected_start_time.astimezone(berlin) for run in scheduled if run.expected_start_time]
    assert {run.state_name for run in scheduled} == {"Scheduled"}
    assert all(run.auto_scheduled for run in scheduled)
    assert [(night.hour, night.minute) for night in nights] == [(2, 0)] * len(scheduled)
    assert [night.date() for night in nights] == [nights[0].date() + timedelta(days=n) for n in range(len(scheduled))]


async def test_a_worker_runs_what_a_schedule_has_made(runs: Runs) -> None:
    deployment = await runs.deploy("completed")
    soon = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(seconds=10))

    await runs.client.create_deployment_schedules(deployment, [(soon, True)])
    [first, *_] = await until_scheduled(runs, deployment, least=3)
    finished = await runs.until(first, seconds=40)

    assert finished.state_name == "Completed"
    await runs.client.delete_deployment(deployment)
