"""Only one batch of a project runs; on real servers: test_g03 and test_g05 of the guarantees."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Running

from phasewise.errors import BatchRunning
from phasewise.orchestration import batch_lock
from phasewise.orchestration.batch_lock import lock_on_server, lock_staging
from phasewise.orchestration.batches import PROJECT_LABEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROJECT = Path("/shop")
OURS = {PROJECT_LABEL: str(PROJECT)}


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


async def lock_project(monkeypatch: pytest.MonkeyPatch, own: FlowRun, server: MainRuns) -> None:
    @asynccontextmanager
    async def get_client() -> AsyncIterator[MainRuns]:
        yield server

    monkeypatch.setattr(batch_lock, "get_client", get_client)
    monkeypatch.setattr(batch_lock, "_LOOK_SECONDS", 0.01)
    await lock_on_server(str(own.id), PROJECT)


async def test_a_batch_that_began_before_but_names_its_project_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=2, labels=OURS), main_run(Running(), began=1)
    labelled = other.model_copy(update={"labels": OURS})

    with pytest.raises(BatchRunning, match=str(other.id)):
        await lock_project(monkeypatch, own, MainRuns([own, other], [own, labelled]))


async def test_a_batch_that_began_before_of_another_project_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=2, labels=OURS), main_run(Running(), began=1)
    labelled = other.model_copy(update={"labels": {PROJECT_LABEL: "/bank"}})

    await lock_project(monkeypatch, own, MainRuns([own, other], [own, labelled]))


async def test_the_batch_that_began_first_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=1, labels=OURS), main_run(Running(), began=2, labels=OURS)

    await lock_project(monkeypatch, own, MainRuns([own, other], [own, other]))


async def test_a_batch_that_is_being_cancelled_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = main_run(Running(), began=1, labels=OURS), main_run(Cancelling(), began=2, labels=OURS)

    with pytest.raises(BatchRunning, match=str(other.id)):
        await lock_project(monkeypatch, own, MainRuns([own, other], [own, other]))


async def test_a_second_local_batch_of_a_project_is_refused_and_the_first_named(tmp_path: Path) -> None:
    async with lock_staging(tmp_path, "batch-1"):
        with pytest.raises(BatchRunning, match="batch-1"):
            async with lock_staging(tmp_path, "batch-2"):
                pass

    async with lock_staging(tmp_path, "batch-2"):
        pass


async def test_a_batch_can_wait_for_the_one_before(tmp_path: Path) -> None:
    async def second() -> None:
        async with lock_staging(tmp_path, "batch-2", on_overlap="wait"):
            pass

    async with lock_staging(tmp_path, "batch-1"):
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        assert not waiting.done()

    await waiting
