from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from phasewise.local.runs import LocalFlowRuns
from phasewise.orchestration.flow_runs import RunRequest
from phasewise.outcomes import StepOutcome
from tests.unit.orchestration.flow_runs_contract import FlowRunsContract, until, watch

ROOT = Path(__file__).resolve().parents[3]
#: One event loop for all, which the shared flow runs belong to.
pytestmark = pytest.mark.asyncio(loop_scope="module")

ORCHESTRATORS = ("nested", "careless")


@dataclass(frozen=True)
class Code:
    """As much of a deployment as a local run needs."""

    entrypoint: str
    work_queue: str
    root: Path | None = None


DEPLOYMENTS = {
    f"{name}/d": Code(f"tests.unit.local.local_flows.{name}", "orchestrators" if name in ORCHESTRATORS else "tables")
    for name in ("work", "crash", "stuck", "stubborn", "overlapping", "nested", "careless", "leaf", "outer", "look")
}


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[LocalFlowRuns]:
    environment = {"PYTHONPATH": str(ROOT)}
    async with LocalFlowRuns(DEPLOYMENTS, environment=environment, **options) as flow_runs:
        yield flow_runs


async def run_one(flow_runs: LocalFlowRuns, flow: str, **parameters: Any) -> StepOutcome:
    request = RunRequest(deployment=f"{flow}/d", name=flow, parameters=parameters)
    [outcome] = await watch(flow_runs, *await flow_runs.submit([request]))
    return outcome


def runs_below(flow_runs: LocalFlowRuns, run_id: str) -> list[StepOutcome]:
    below = {run_id}
    found = []
    for run in flow_runs.read_runs():  # parents come before children
        if run.parent_id in below:
            below.add(run.run_id)
            found.append(run)
    return found


def read_log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_below(marker: str) -> list[int]:
    """Return the processes with *marker* in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in environ.read_bytes() and is_running(int(environ.parent.name)):
                found.append(int(environ.parent.name))
        except OSError:
            continue  # it ended, or is not ours
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[LocalFlowRuns]:
    """One warm process for all tests that need no options of their own: it takes seconds to start."""
    async with running() as flow_runs:
        yield flow_runs


class TestLocalFlowRuns(FlowRunsContract):
    @pytest.fixture
    def flow_runs(self, shared: LocalFlowRuns) -> LocalFlowRuns:
        return shared


async def test_no_more_tables_run_at_once_than_the_limit(tmp_path: Path) -> None:
    requests = [
        RunRequest(deployment="overlapping/d", parameters={"folder": str(tmp_path), "item": str(number)})
        for number in range(6)
    ]
    async with running(table_concurrency=2) as flow_runs:
        await watch(flow_runs, *await flow_runs.submit(requests))

    assert max(map(int, read_log(tmp_path))) == 2


async def test_orchestrators_three_levels_deep_complete_with_one_slot_for_tables(tmp_path: Path) -> None:
    async with running(table_concurrency=1) as flow_runs:
        async with flow_runs.running("main", "00000000-0000-4000-8000-000000000001"):
            outcome = await run_one(flow_runs, "nested", folder=str(tmp_path), depth=2)
        runs = flow_runs.read_runs()

    assert outcome.is_completed, outcome.message
    assert sorted(read_log(tmp_path)) == ["a", "b"]
    names = {run.run_id: run.name for run in runs}
    assert [names.get(run.parent_id or "") for run in runs] == [
        None, "main", "nested", f"nested/{tmp_path}", f"nested/{tmp_path}", f"nested/{tmp_path}",
    ]  # fmt: skip
    assert all(run.is_completed and run.started_at and run.ended_at for run in runs)


async def test_cancelling_a_parent_ends_the_processes_below_it(shared: LocalFlowRuns, tmp_path: Path) -> None:
    parameters = {"folder": str(tmp_path), "depth": 1, "deployment": "stuck/d"}
    [parent] = await shared.submit([RunRequest(deployment="nested/d", parameters=parameters)])
    await until(lambda: sorted(read_log(tmp_path)) == ["a", "b"])

    await shared.cancel([parent])

    below = [run.run_id for run in runs_below(shared, parent)]
    outcomes = await watch(shared, parent, *below)
    assert [run.state_type for run in outcomes] == ["CANCELLED"] * 4
    assert sorted(read_log(tmp_path)) == ["a", "b", "cleaned up a", "cleaned up b"]


async def test_a_parent_that_fails_leaves_nothing_running_below_it(shared: LocalFlowRuns, tmp_path: Path) -> None:
    outcome = await run_one(shared, "careless", folder=str(tmp_path))

    [left] = await watch(shared, *[run.run_id for run in runs_below(shared, outcome.run_id)])
    assert left.state_type == "CANCELLED"
    assert outcome.message == "ValueError: not my day"


async def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    async with running(cancel_grace_seconds=0.1) as flow_runs:
        parameters = {"folder": str(tmp_path), "item": "a"}
        [run_id] = await flow_runs.submit([RunRequest(deployment="stubborn/d", parameters=parameters)])
        await until(lambda: len(read_log(tmp_path)) == 1)

        await flow_runs.cancel([run_id])
        [outcome] = await watch(flow_runs, run_id)

        assert outcome.state_type == "CANCELLED"
        assert not is_running(int(read_log(tmp_path)[0]))


async def test_flows_and_tasks_see_what_they_see_anywhere(shared: LocalFlowRuns, tmp_path: Path) -> None:
    outcome = await run_one(shared, "outer", folder=str(tmp_path), count="2")

    assert outcome.is_completed, outcome.message
    assert outcome.summary == {
        "id": outcome.run_id,
        "name": "outer",
        "retried": "third time",
        "submitted": 8,
        "mapped": 12,
        "awaited": 6,
        "inner": 3,
    }


async def test_wrong_parameters_fail_the_run_and_name_the_parameter(shared: LocalFlowRuns, tmp_path: Path) -> None:
    outcome = await run_one(shared, "outer", folder=str(tmp_path), count="two")

    assert outcome.state_type == "FAILED"
    assert "count" in outcome.message


async def test_a_flow_run_can_read_the_others_of_its_batch(shared: LocalFlowRuns, tmp_path: Path) -> None:
    before = await run_one(shared, "work", folder=str(tmp_path), item="a")
    outcome = await run_one(shared, "look")

    assert outcome.summary[before.run_id] == "COMPLETED"
    assert outcome.summary[outcome.run_id] == "RUNNING"


async def test_a_flow_in_a_process_of_its_own_is_told_why_it_cannot_start_others(shared: LocalFlowRuns) -> None:
    outcome = await run_one(shared, "leaf")

    assert outcome.state_type == "FAILED"
    assert 'give its step work_queue="orchestrators"' in outcome.message


async def test_code_that_changes_while_a_batch_runs_is_run_as_it_is_now(tmp_path: Path) -> None:
    module = tmp_path / "changing_flows.py"
    template = "from prefect import flow\nfrom phasewise.orchestration.flow_runs import report_summary\n\n"
    template += '@flow(name="say")\ndef say():\n    report_summary({{"said": "{}"}})\n'
    module.write_text(template.format("before"))
    deployments = {"say/d": Code("changing_flows.say", "tables")}
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    async with LocalFlowRuns(deployments, preload=["changing_flows"], environment=environment) as flow_runs:
        before = await run_one(flow_runs, "say")
        module.write_text(template.format("after, longer"))
        after = await run_one(flow_runs, "say")

    assert (before.summary, after.summary) == ({"said": "before"}, {"said": "after, longer"})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_nothing_is_left_of_a_process_that_ends(tmp_path: Path, how: signal.Signals) -> None:
    program = f"""
import asyncio, signal
from tests.unit.local.test_runs import RunRequest, running, watch
signal.signal(signal.SIGTERM, signal.default_int_handler)
async def main():
    async with running(cancel_grace_seconds=1) as flow_runs:
        parameters = {{"folder": {str(tmp_path)!r}, "depth": 0, "deployment": "stuck/d"}}
        await watch(flow_runs, *await flow_runs.submit([RunRequest(deployment="nested/d", parameters=parameters)]))
asyncio.run(main())
"""
    environment = {**os.environ, "MARKER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:  # noqa: ASYNC220 - at once
        try:
            await until(lambda: sorted(read_log(tmp_path)) == ["a", "b"])
            assert len(processes_below(f"MARKER={tmp_path}")) == 4

            process.send_signal(how)
            await asyncio.to_thread(process.wait, timeout=20)
        finally:
            process.kill()

    await until(lambda: processes_below(f"MARKER={tmp_path}") == [])
