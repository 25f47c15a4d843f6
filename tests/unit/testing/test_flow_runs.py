from __future__ import annotations

import asyncio

import pytest

from phasewise.testing.flow_runs import MemoryFlowRuns, ProcessDied
from tests.unit.orchestration.flow_runs_contract import FlowRunsContract, is_marked, note


async def work(folder: str, item: str, rows: int = 1) -> dict[str, int]:
    note(folder, item)
    await asyncio.sleep(0)
    if is_marked(folder, f"{item}.broken"):
        raise ValueError(f"{item} is broken")
    return {"rows": rows}


async def crash(folder: str, item: str) -> None:
    if is_marked(folder, f"{item}.broken"):
        raise ProcessDied("killed")


async def stuck(folder: str, item: str) -> None:
    note(folder, item)
    await asyncio.Event().wait()


class TestMemoryFlowRuns(FlowRunsContract):
    @pytest.fixture
    def flow_runs(self) -> MemoryFlowRuns:
        return MemoryFlowRuns({"work/d": work, "crash/d": crash, "stuck/d": stuck})
