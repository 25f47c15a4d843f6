"""What can be resumed; the rest of ``batches`` is tested on real servers (test_g03, test_g04, test_g05)."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running

from phasewise import batches
from phasewise.errors import BatchRunning, UnknownBatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class OneRun:
    """A client of a server that has one flow run."""

    def __init__(self, state: State[Any]) -> None:
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4(), state=state)
        self.wanted: list[State[Any]] = []

    async def read_flow_run(self, _run_id: UUID) -> FlowRun:
        return self.run

    async def set_flow_run_state(self, _run_id: UUID, state: State[Any], *, force: bool = False) -> None:
        del force
        self.wanted.append(state)


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
    await batches.resume_batch(str(server.run.id))

    assert [state.name for state in server.wanted] == ["AwaitingRetry"]


@pytest.mark.parametrize("server", [Running(), Pending(), Cancelling()], indirect=True)
async def test_a_batch_that_has_not_ended_is_not_started_a_second_time(server: OneRun) -> None:
    with pytest.raises(BatchRunning, match=f"phasewise cancel {server.run.id}"):
        await batches.resume_batch(str(server.run.id))

    assert server.wanted == []


@pytest.mark.parametrize("server", [Completed()], indirect=True)
async def test_a_batch_that_completed_has_nothing_to_resume(server: OneRun) -> None:
    with pytest.raises(UnknownBatch, match="nothing to resume"):
        await batches.resume_batch(str(server.run.id))

    assert server.wanted == []
