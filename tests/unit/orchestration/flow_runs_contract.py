"""What every adapter of ``FlowRuns`` promises, as tests: subclass ``FlowRunsContract`` and give it the fixture.

The flows write what they do into a folder, so the same tests see into the processes of any adapter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phasewise.errors import DeploymentMissing
from phasewise.orchestration.flow_runs import FlowRuns, RunRequest
from phasewise.outcomes import StepOutcome


def note(folder: str, line: str) -> None:
    with (Path(folder) / "log").open("a") as file:
        file.write(f"{line}\n")


def is_marked(folder: str, item: str) -> bool:
    return (Path(folder) / item).exists()


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def watch(flow_runs: FlowRuns, *run_ids: str) -> list[StepOutcome]:
    return [outcome async for outcome in flow_runs.watch(run_ids)]


class FlowRunsContract:
    """Tests of an adapter whose deployments are these.

    ``work/d`` notes its item and completes with the summary ``{"rows": rows}``; while the folder has a file
    ``<item>.broken`` it fails, saying "<item> is broken". ``crash/d`` does the same but its process dies.
    ``stuck/d`` notes its item and never ends.
    """

    @pytest.fixture
    def flow_runs(self) -> FlowRuns:
        raise NotImplementedError

    @pytest.fixture
    def request_run(self, tmp_path: Path) -> Callable[..., RunRequest]:
        def make(flow: str, item: str = "a", key: str | None = None, **parameters: Any) -> RunRequest:
            parameters |= {"folder": str(tmp_path), "item": item}
            # A server keeps keys for ever, and these tests may share one.
            key = f"{tmp_path}/{key}" if key else None
            return RunRequest(deployment=f"{flow}/d", name=f"{flow}/{item}", parameters=parameters, key=key)

        return make

    @pytest.fixture
    def log(self, tmp_path: Path) -> Callable[[], list[str]]:
        return lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []

    async def test_each_run_is_watched_to_its_end_once(self, flow_runs: FlowRuns, request_run: Any) -> None:
        first, second = await flow_runs.submit([request_run("work", "a", rows=3), request_run("work", "b", rows=5)])

        outcomes = {outcome.run_id: outcome for outcome in await watch(flow_runs, first, second, first)}

        assert [outcomes[run_id].name for run_id in (first, second)] == ["work/a", "work/b"]
        assert [outcomes[run_id].summary for run_id in (first, second)] == [{"rows": 3}, {"rows": 5}]
        assert {outcome.state_type for outcome in outcomes.values()} == {"COMPLETED"}
        assert all(one.started_at and one.ended_at and one.started_at <= one.ended_at for one in outcomes.values())

    async def test_a_run_keeps_its_place_in_the_pipeline_when_it_runs_again(
        self, flow_runs: FlowRuns, request_run: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "a.broken").touch()
        request = replace(request_run("work", key="k"), phase="tables", step="process", item="a")
        outcomes = [await watch(flow_runs, *await flow_runs.submit([request])) for _ in range(2)]
        await flow_runs.restart([outcomes[0][0].run_id])
        outcomes.append(await watch(flow_runs, outcomes[0][0].run_id))

        places = [(one.phase, one.step, one.item, one.attempts) for [one] in outcomes]
        assert places == [("tables", "process", "a", attempt) for attempt in (1, 2, 3)]

    async def test_a_run_without_a_place_in_a_pipeline_names_none(self, flow_runs: FlowRuns, request_run: Any) -> None:
        [outcome] = await watch(flow_runs, *await flow_runs.submit([request_run("work")]))

        assert (outcome.phase, outcome.step, outcome.item) == (None, None, None)

    async def test_two_requests_with_one_key_are_one_run(self, flow_runs: FlowRuns, request_run: Any, log: Any) -> None:
        [first] = await flow_runs.submit([request_run("work", key="k")])
        [second] = await flow_runs.submit([request_run("work", key="k")])
        await watch(flow_runs, first)
        [third] = await flow_runs.submit([request_run("work", key="k")])
        [outcome] = await watch(flow_runs, third)

        assert first == second == third
        assert outcome.attempts == 1
        assert log() == ["a"]

    async def test_requests_without_a_key_are_runs_of_their_own(self, flow_runs: FlowRuns, request_run: Any) -> None:
        run_ids = await flow_runs.submit([request_run("work"), request_run("work")])

        await watch(flow_runs, *run_ids)

        assert len(set(run_ids)) == 2

    async def test_a_run_that_failed_says_why_and_runs_again_under_its_own_id(
        self, flow_runs: FlowRuns, request_run: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "a.broken").touch()
        [first] = await flow_runs.submit([request_run("work", key="k")])
        [failed] = await watch(flow_runs, first)
        (tmp_path / "a.broken").unlink()

        [second] = await flow_runs.submit([request_run("work", key="k")])
        [completed] = await watch(flow_runs, second)

        assert failed.state_type == "FAILED"
        assert "a is broken" in failed.message
        assert first == second
        assert completed.state_type == "COMPLETED"
        assert completed.attempts == 2

    async def test_a_run_whose_process_dies_is_crashed_and_can_be_restarted(
        self, flow_runs: FlowRuns, request_run: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "a.broken").touch()
        [run_id] = await flow_runs.submit([request_run("crash")])
        [crashed] = await watch(flow_runs, run_id)
        (tmp_path / "a.broken").unlink()

        await flow_runs.restart([run_id])
        [completed] = await watch(flow_runs, run_id)

        assert crashed.state_type == "CRASHED"
        assert crashed.message
        assert completed.state_type == "COMPLETED"
        assert completed.run_id == run_id

    async def test_a_completed_run_is_not_restarted(self, flow_runs: FlowRuns, request_run: Any, log: Any) -> None:
        [run_id] = await flow_runs.submit([request_run("work")])
        await watch(flow_runs, run_id)

        await flow_runs.restart([run_id])
        [outcome] = await watch(flow_runs, run_id)

        assert outcome.attempts == 1
        assert log() == ["a"]

    async def test_a_cancelled_run_ends_and_can_be_submitted_again(
        self, flow_runs: FlowRuns, request_run: Any, log: Any
    ) -> None:
        [run_id] = await flow_runs.submit([request_run("stuck", key="k")])
        await until(lambda: log() == ["a"])
        await flow_runs.cancel([run_id])
        await flow_runs.cancel([run_id])
        [cancelled] = await watch(flow_runs, run_id)

        [again] = await flow_runs.submit([request_run("stuck", key="k")])
        await until(lambda: log().count("a") == 2)
        await flow_runs.cancel([run_id])
        await watch(flow_runs, run_id)

        assert cancelled.state_type == "CANCELLED"
        assert again == run_id

    async def test_a_run_can_be_cancelled_before_it_has_started(self, flow_runs: FlowRuns, request_run: Any) -> None:
        [run_id] = await flow_runs.submit([request_run("stuck")])

        await flow_runs.cancel([run_id])
        [outcome] = await watch(flow_runs, run_id)

        assert outcome.state_type == "CANCELLED"

    async def test_cancelling_leaves_what_is_final_as_it_is(self, flow_runs: FlowRuns, request_run: Any) -> None:
        [run_id] = await flow_runs.submit([request_run("work")])
        await watch(flow_runs, run_id)

        await flow_runs.cancel([run_id])
        [outcome] = await watch(flow_runs, run_id)

        assert outcome.state_type == "COMPLETED"

    async def test_a_missing_deployment_is_named_and_nothing_starts(
        self, flow_runs: FlowRuns, request_run: Any, log: Any
    ) -> None:
        with pytest.raises(DeploymentMissing, match='"nobody/d"'):
            await flow_runs.submit([request_run("work"), request_run("nobody")])

        assert log() == []
