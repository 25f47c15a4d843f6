"""How cancelling goes down; on a real server: test_g03 of the guarantees."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Running, Scheduled

from phasewise.orchestration.cancel import cancel_below, cancel_runs


class Family:
    """A client of a server with runs above and below each other."""

    def __init__(self) -> None:
        self.runs: dict[UUID, FlowRun] = {}
        self.parents: dict[UUID, UUID] = {}
        self.asked: list[UUID] = []

    def add(self, state: State[Any], *, below: FlowRun | None = None) -> FlowRun:
        run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state)
        self.runs[run.id] = run
        if below is not None:
            self.parents[run.id] = below.id
        return run

    async def read_flow_runs(self, *, flow_run_filter: FlowRunFilter, **_: object) -> list[FlowRun]:
        if flow_run_filter.parent_flow_run_id is not None:
            wanted = flow_run_filter.parent_flow_run_id.any_ or []
            return [self.runs[run_id] for run_id, parent in self.parents.items() if parent in wanted]
        assert flow_run_filter.id is not None
        return [self.runs[run_id] for run_id in flow_run_filter.id.any_ or []]

    async def set_flow_run_state(self, run_id: UUID, _state: State[Any]) -> None:
        self.asked.append(run_id)


async def test_everything_below_is_cancelled_that_is_not_final_also_below_what_is() -> None:
    family = Family()
    client: Any = family
    top = family.add(Running())
    done = family.add(Completed(), below=top)
    leaf = family.add(Running(), below=done)

    asked = await cancel_runs(client, [top.id])

    assert asked == family.asked == [top.id, leaf.id]


async def test_what_has_a_process_is_cancelled_before_what_waits_and_told_at_once() -> None:
    family = Family()
    client: Any = family
    top = family.add(Running())
    waiting = family.add(Scheduled(), below=top)
    running = family.add(Running(), below=top)
    told: list[UUID] = []

    await cancel_below(client, [top.id], on_asked=told.append)

    assert family.asked == told == [running.id, waiting.id]
