"""What may run and what can be resumed; on real servers: test_g03, test_g04 and test_g05 of the guarantees."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running, Scheduled

from phasewise.errors import BatchRunning, UnknownBatch
from phasewise.orchestration import batches
from phasewise.orchestration.batches import PROCESS_LABEL, find_batch, resume_batch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class OneRun:
    """A client of a server that has one flow run."""

    def __init__(self, state: State[Any]) -> None:
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4(), state=state)
        self.wanted: list[State[Any]] = []
        self.labels: dict[str, str] = {}

    async def read_flow_run(self, _run_id: UUID) -> FlowRun:
        return self.run

    async def set_flow_run_state(self, _run_id: UUID, state: State[Any], *, force: bool = False) -> None:
        del force
        self.wanted.append(state)

    async def update_flow_run_labels(self, _run_id: UUID, labels: dict[str, str]) -> None:
        assert self.wanted == [], "it must not run before it names its process"
        self.labels |= labels

    async def read_flow_runs(self, **_: object) -> list[FlowRun]:
        return [self.run]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> OneRun:
    server = OneRun(request.param)

    @asynccontextmanager
    async def get_client() -> AsyncIterator[OneRun]:
        yield server

    monkeypatch.setattr(batches, "get_client", get_client)
    return server


@pytest.mark.parametrize("server", [Failed(), Crashed(), Cancelled()], indirect=True)
async def test_a_batch_that_did_not_complete_is_scheduled_again(server: OneRun) -> None:
    await resume_batch(str(server.run.id))

    assert [state.name for state in server.wanted] == ["AwaitingRetry"]


@pytest.mark.parametrize("server", [Running(), Pending(), Cancelling()], indirect=True)
async def test_a_batch_that_has_not_ended_is_not_started_a_second_time(server: OneRun) -> None:
    with pytest.raises(BatchRunning, match=f"phasewise cancel {server.run.id}"):
        await resume_batch(str(server.run.id))

    assert server.wanted == []


@pytest.mark.parametrize("server", [Completed()], indirect=True)
async def test_a_batch_that_completed_has_nothing_to_resume(server: OneRun) -> None:
    with pytest.raises(UnknownBatch, match="nothing to resume"):
        await resume_batch(str(server.run.id))

    assert server.wanted == []


@pytest.mark.parametrize("server", [Crashed()], indirect=True)
async def test_a_batch_that_is_resumed_in_a_process_of_its_own_names_it_first(server: OneRun) -> None:
    await resume_batch(str(server.run.id), process="host/1/2")

    assert server.labels == {PROCESS_LABEL: "host/1/2"}


@pytest.mark.parametrize("server", [Scheduled()], indirect=True)
async def test_a_batch_that_has_not_begun_is_found_by_the_project_that_it_was_told(server: OneRun) -> None:
    server.run.job_variables = {"env": {"PHASEWISE_PROJECT": "/shop"}}

    found = await find_batch(Path("/shop"), states=[StateType.SCHEDULED])

    assert found.id == server.run.id
    with pytest.raises(UnknownBatch):
        await find_batch(Path("/bank"), states=[StateType.SCHEDULED])


@pytest.mark.parametrize("server", [Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=8))], indirect=True)
async def test_a_batch_of_tomorrow_s_schedule_is_not_the_one_to_cancel(server: OneRun) -> None:
    server.run.job_variables = {"env": {"PHASEWISE_PROJECT": "/shop"}}
    server.run.next_scheduled_start_time = server.run.state and server.run.state.state_details.scheduled_time

    with pytest.raises(UnknownBatch):
        await find_batch(Path("/shop"), states=[StateType.SCHEDULED])
