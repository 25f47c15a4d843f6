"""What the caretaker of a worker cancels; the rest of it is tested on real servers (test_g03, test_g08)."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Cancelling, Failed, Running, Scheduled

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
