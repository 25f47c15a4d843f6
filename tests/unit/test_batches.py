"""What may run and what can be resumed; on real servers: test_g03, test_g04 and test_g05 of the guarantees."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
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


PROJECT = Path("/shop")
OURS = {batches.PROJECT_LABEL: str(PROJECT)}


class MainRuns:
    """A client of a server whose main_etl runs become *later* after the first look at them."""

    def __init__(self, first: list[FlowRun], later: list[FlowRun]) -> None:
        self.looks = [first, later]

    async def update_flow_run_labels(self, _run_id: UUID, _labels: object) -> None:
        pass

    async def read_flow_runs(self, **_: object) -> list[FlowRun]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def main_run(state: State[Any], *, began: float, labels: dict[str, str] | None = None) -> FlowRun:
    state.timestamp = datetime.fromtimestamp(began, UTC)
    return FlowRun(id=uuid4(), flow_id=uuid4(), state=state, labels=labels or {})


async def claim(monkeypatch: pytest.MonkeyPatch, own: FlowRun, server: MainRuns) -> None:
    @asynccontextmanager
    async def get_client() -> AsyncIterator[MainRuns]:
        yield server

    monkeypatch.setattr(batches, "get_client", get_client)
    monkeypatch.setattr(batches, "_LOOK_SECONDS", 0.01)
    await batches.claim_batch(str(own.id), PROJECT)


async def test_a_batch_that_began_before_but_names_its_project_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=2, labels=OURS), main_run(Running(), began=1)
    labelled = other.model_copy(update={"labels": OURS})

    with pytest.raises(BatchRunning, match=str(other.id)):
        await claim(monkeypatch, own, MainRuns([own, other], [own, labelled]))


async def test_a_batch_that_began_before_of_another_project_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=2, labels=OURS), main_run(Running(), began=1)
    labelled = other.model_copy(update={"labels": {batches.PROJECT_LABEL: "/bank"}})

    await claim(monkeypatch, own, MainRuns([own, other], [own, labelled]))


async def test_the_batch_that_began_first_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=1, labels=OURS), main_run(Running(), began=2, labels=OURS)

    await claim(monkeypatch, own, MainRuns([own, other], [own, other]))


async def test_a_batch_that_is_being_cancelled_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=1, labels=OURS), main_run(Cancelling(), began=2, labels=OURS)

    with pytest.raises(BatchRunning, match=str(other.id)):
        await claim(monkeypatch, own, MainRuns([own, other], [own, other]))
