"""What the caretaker of a worker cancels; the rest of it is tested on real servers (test_g03, test_g08)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, Worker
from prefect.states import Cancelled, Cancelling, Failed, Pending, Running, Scheduled

from phasewise import caretaker
from phasewise.caretaker import Caretaker


@pytest.mark.parametrize(
    ("state", "is_cancelled_below"),
    [(Failed(), True), (Cancelled(), True), (Cancelling(), True), (Running(), False), (Scheduled(), False)],
)
async def test_what_is_below_a_run_ends_with_it_unless_it_runs_again_meanwhile(
    monkeypatch: pytest.MonkeyPatch, state: State[Any], is_cancelled_below: bool
) -> None:
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state)
    cancelled: list[UUID] = []

    async def read_runs(_client: object, _run_ids: object) -> list[FlowRun]:
        return [run]

    async def cancel_runs(_client: object, run_ids: list[UUID]) -> list[UUID]:
        cancelled.extend(run_ids)
        return run_ids

    monkeypatch.setattr(caretaker, "read_runs", read_runs)
    monkeypatch.setattr(caretaker, "cancel_runs", cancel_runs)
    client: Any = None
    one = Caretaker(client, pool="pool", name="worker", own_runs=lambda: (), lost_after_seconds=25)

    await one._cancel_below({run.id})

    assert cancelled == ([run.id] if is_cancelled_below else [])


class DeadWorkersRun:
    """A client of a server with a worker that is silent and one run that names it."""

    def __init__(self, state: State[Any], *, seconds: float) -> None:
        now = datetime.now(UTC)
        state.timestamp = now - timedelta(seconds=seconds)
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state, labels={"prefect.worker.name": "dead"})
        self.beats = {"own": now, "dead": now - timedelta(minutes=2)}
        self.crashed: list[UUID] = []

    async def read_workers_for_work_pool(self, _pool: str) -> list[Worker]:
        pool = uuid4()
        return [Worker(name=name, work_pool_id=pool, last_heartbeat_time=at) for name, at in self.beats.items()]

    async def read_flow_runs(self, **_: object) -> list[FlowRun]:
        return [self.run]

    async def set_flow_run_state(self, run_id: UUID, _state: State[Any]) -> None:
        self.crashed.append(run_id)


@pytest.mark.parametrize(
    ("state", "seconds", "is_lost"), [(Running(), 1, True), (Pending(), 20, True), (Pending(), 1, False)]
)
async def test_a_run_that_another_worker_has_just_claimed_is_not_lost_with_the_one_that_it_still_names(
    state: State[Any], seconds: float, is_lost: bool
) -> None:
    client: Any = DeadWorkersRun(state, seconds=seconds)
    one = Caretaker(client, pool="pool", name="own", own_runs=lambda: (), lost_after_seconds=25)

    await one._find_lost(is_first=False)

    assert client.crashed == ([client.run.id] if is_lost else [])
