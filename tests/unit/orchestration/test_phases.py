from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from phasewise import BATCH, FanOut, FlowRunsFailed, Phase, Step, run_phases, trigger_subflow, wait_for_flow_runs
from phasewise.errors import DeploymentMissing, PipelineInvalid
from phasewise.testing.flow_runs import MemoryFlowRuns, ProcessDied


class Recorder:
    """Bodies of flows that note when they ran."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.broken: set[str] = set()

    async def load(self, table: str = "all", batch_id: str = "") -> Mapping[str, Any]:
        self.log.append(f"start {table}")
        await asyncio.sleep(0)
        if table in self.broken:
            raise ValueError(f"{table} is broken")
        self.log.append(f"end {table}")
        return {"rows": len(table), "batch": batch_id}

    async def stuck(self, **_parameters: object) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def flow_runs(recorder: Recorder) -> MemoryFlowRuns:
    return MemoryFlowRuns({"load/d": recorder.load, "stuck/d": recorder.stuck})


def tables(*items: str) -> FanOut:
    return FanOut(name="tables", deployment="load/d", over="table", items=items, parameters={"batch_id": BATCH})


def publish(table: str = "publish") -> Step:
    return Step(name="publish", deployment="load/d", parameters={"table": table})


async def test_a_phase_starts_only_after_every_step_of_the_one_before(
    recorder: Recorder, flow_runs: MemoryFlowRuns
) -> None:
    await run_phases([Phase(steps=[tables("a", "b")]), Phase(steps=[publish()])], batch="b1", flow_runs=flow_runs)

    assert recorder.log.index("start publish") > recorder.log.index("end a")
    assert recorder.log.index("start publish") > recorder.log.index("end b")


async def test_each_run_is_told_its_phase_its_step_and_its_item(flow_runs: MemoryFlowRuns) -> None:
    phases = [Phase(name="load", steps=[tables("a", "b")]), Phase(name="publish", steps=[publish()])]

    outcome = await run_phases(phases, batch="b1", flow_runs=flow_runs)

    requests = [run.request for run in flow_runs.runs.values()]
    expected = [("load", "tables", "a"), ("load", "tables", "b"), ("publish", "publish", None)]
    assert [(request.phase, request.step, request.item) for request in requests] == expected
    assert [(step.phase, step.step, step.item) for phase in outcome.phases for step in phase.steps] == expected


async def test_phases_without_a_name_of_their_own_are_told_apart_by_their_number(flow_runs: MemoryFlowRuns) -> None:
    steps = [[replace(publish(), name=str(number))] for number in range(4)]
    names = ["load", "", "load", "tidy"]
    phases = [Phase(name=name, steps=these) for name, these in zip(names, steps, strict=True)]

    outcome = await run_phases(phases, batch="b1", flow_runs=flow_runs)

    assert [phase.name for phase in outcome.phases] == ["load 1", "Phase 2", "load 3", "tidy"]


async def test_steps_of_a_phase_run_at_the_same_time(recorder: Recorder, flow_runs: MemoryFlowRuns) -> None:
    await run_phases([Phase(steps=[tables("a", "b")])], batch="b1", flow_runs=flow_runs)

    assert recorder.log[:2] == ["start a", "start b"]


async def test_a_failed_step_fails_the_pipeline_and_no_later_phase_starts(
    recorder: Recorder, flow_runs: MemoryFlowRuns
) -> None:
    recorder.broken = {"b"}

    with pytest.raises(FlowRunsFailed) as caught:
        await run_phases(
            [Phase(steps=[tables("a", "b", "c")]), Phase(steps=[publish()])], batch="b1", flow_runs=flow_runs
        )

    assert [outcome.name for outcome in caught.value.outcomes] == ["load/b"]
    assert "load/b Failed" in str(caught.value)
    assert "b is broken" in str(caught.value)
    assert "start publish" not in recorder.log
    assert "end c" in recorder.log


async def test_a_retried_batch_runs_only_what_did_not_complete(recorder: Recorder, flow_runs: MemoryFlowRuns) -> None:
    recorder.broken = {"b"}
    phases = [Phase(steps=[tables("a", "b")]), Phase(steps=[publish()])]
    with pytest.raises(FlowRunsFailed):
        await run_phases(phases, batch="b1", flow_runs=flow_runs)
    recorder.broken = set()

    outcome = await run_phases(phases, batch="b1", flow_runs=flow_runs)

    assert outcome.is_completed
    assert recorder.log.count("start a") == 1
    assert recorder.log.count("start b") == 2
    assert flow_runs.find("load/b").attempts == 2


async def test_another_batch_runs_everything_anew(recorder: Recorder, flow_runs: MemoryFlowRuns) -> None:
    for batch in ("b1", "b2"):
        await run_phases([Phase(steps=[tables("a")])], batch=batch, flow_runs=flow_runs)

    assert recorder.log.count("start a") == 2


async def test_cancel_on_failure_ends_the_siblings_of_a_failed_step(
    recorder: Recorder, flow_runs: MemoryFlowRuns
) -> None:
    recorder.broken = {"b"}
    stuck = Step(name="stuck", deployment="stuck/d")

    with pytest.raises(FlowRunsFailed) as caught:
        await run_phases([Phase(steps=[stuck, tables("b")], on_failure="cancel")], batch="b1", flow_runs=flow_runs)

    assert {outcome.state_type for outcome in caught.value.outcomes} == {"CANCELLED", "FAILED"}


async def test_steps_are_cancelled_when_their_parent_is(flow_runs: MemoryFlowRuns) -> None:
    parent = asyncio.create_task(
        run_phases([Phase(steps=[Step(name="stuck", deployment="stuck/d")])], batch="b1", flow_runs=flow_runs)
    )
    while not flow_runs.runs:
        await asyncio.sleep(0)
    await asyncio.sleep(0)

    parent.cancel()
    with pytest.raises(asyncio.CancelledError):
        await parent
    await asyncio.sleep(0)

    [run] = flow_runs.runs.values()
    await run.is_final.wait()
    assert run.outcome is not None
    assert run.outcome.state_type == "CANCELLED"


async def test_outcomes_come_in_the_order_asked_for_with_their_summaries(flow_runs: MemoryFlowRuns) -> None:
    first = await trigger_subflow("load/d", {"table": "longer"}, flow_runs=flow_runs)
    second = await trigger_subflow("load/d", {"table": "x"}, flow_runs=flow_runs)

    outcomes = await wait_for_flow_runs([second, first], flow_runs=flow_runs)

    assert [outcome.summary["rows"] for outcome in outcomes] == [1, 6]


async def test_two_triggers_with_one_key_are_one_run(recorder: Recorder, flow_runs: MemoryFlowRuns) -> None:
    ids = [await trigger_subflow("load/d", {"table": "a"}, key="same", flow_runs=flow_runs) for _ in range(2)]
    await wait_for_flow_runs(ids, flow_runs=flow_runs)

    assert ids[0] == ids[1]
    assert recorder.log.count("start a") == 1


async def test_a_missing_deployment_is_named(flow_runs: MemoryFlowRuns) -> None:
    with pytest.raises(DeploymentMissing, match='"nobody/d" does not exist'):
        await trigger_subflow("nobody/d", flow_runs=flow_runs)


async def test_waiting_ends_with_the_timeout_and_leaves_the_runs_alone(flow_runs: MemoryFlowRuns) -> None:
    run_id = await trigger_subflow("stuck/d", flow_runs=flow_runs)

    with pytest.raises(TimeoutError):
        await wait_for_flow_runs([run_id], timeout=0.01, flow_runs=flow_runs)

    assert flow_runs.runs[run_id].outcome is None
    await flow_runs.cancel([run_id])


async def test_an_empty_fan_out_completes(flow_runs: MemoryFlowRuns) -> None:
    outcome = await run_phases([Phase(steps=[tables()])], batch="b1", flow_runs=flow_runs)

    assert outcome.is_completed


async def test_a_failure_budget_lets_the_phase_complete_and_names_what_failed(
    recorder: Recorder, flow_runs: MemoryFlowRuns
) -> None:
    recorder.broken = {"b"}
    fan_out = FanOut(name="tables", deployment="load/d", over="table", items=("a", "b", "c", "d"), allow_failed="25%")

    outcome = await run_phases([Phase(steps=[fan_out]), Phase(steps=[publish()])], batch="b1", flow_runs=flow_runs)

    assert outcome.is_completed
    assert [step.item for step in outcome.phases[0].tolerated] == ["b"]
    assert "end publish" in recorder.log


async def test_one_failure_more_than_the_budget_fails_the_phase(recorder: Recorder, flow_runs: MemoryFlowRuns) -> None:
    recorder.broken = {"a", "b"}
    fan_out = FanOut(name="tables", deployment="load/d", over="table", items=("a", "b", "c"), allow_failed=1)

    with pytest.raises(FlowRunsFailed) as caught:
        await run_phases([Phase(steps=[fan_out])], batch="b1", flow_runs=flow_runs)

    assert [outcome.item for outcome in caught.value.outcomes] == ["a", "b"]


def parts_of(*names: str) -> dict[str, Mapping[str, Any]]:
    """Return the parts 1 and 2 of each of *names*, as items with their parameters."""
    return {f"{name} {number}": {"table": name, "batch_id": str(number)} for name in names for number in (1, 2)}


async def test_a_part_gets_parameters_of_its_own_and_is_a_run_of_its_own(flow_runs: MemoryFlowRuns) -> None:
    parts = parts_of("a")
    fan_out = FanOut(name="tables", deployment="load/d", over="table", items=(*parts, "b"), parts=parts)

    outcome = await run_phases([Phase(steps=[fan_out])], batch="b1", flow_runs=flow_runs)

    steps = outcome.phases[0].steps
    assert [step.name for step in steps] == ["load/a 1", "load/a 2", "load/b"]
    assert [step.summary for step in steps] == [{"rows": 1, "batch": batch} for batch in ("1", "2", "")]


async def test_parts_of_one_thing_count_as_one_failure(recorder: Recorder, flow_runs: MemoryFlowRuns) -> None:
    recorder.broken = {"a"}
    parts = parts_of("a", "b")
    fan_out = FanOut(
        name="tables", deployment="load/d", over="table", items=list(parts), parts=parts, allow_failed="50%"
    )

    outcome = await run_phases([Phase(steps=[fan_out])], batch="b1", flow_runs=flow_runs)

    assert [step.item for step in outcome.phases[0].tolerated] == ["a 1", "a 2"]
    recorder.broken = {"a", "b"}
    with pytest.raises(FlowRunsFailed):
        await run_phases([Phase(steps=[fan_out])], batch="b2", flow_runs=flow_runs)


@pytest.mark.parametrize(
    ("allow_failed", "total", "count"),
    [(0, 9, 0), (2, 9, 2), ("2", 9, 2), ("10%", 27, 2), ("10%", 9, 0), ("100%", 3, 3)],
)
def test_a_budget_is_a_number_or_a_share_rounded_down(allow_failed: int | str, total: int, count: int) -> None:
    assert budget(allow_failed, total).count_allowed() == count


@pytest.mark.parametrize("allow_failed", [-1, "few", "120%", "-5%", ""])
def test_a_budget_that_is_neither_is_refused(allow_failed: int | str) -> None:
    with pytest.raises(PipelineInvalid, match="neither a number nor a share"):
        budget(allow_failed, 10).count_allowed()


def budget(allow_failed: int | str, total: int) -> FanOut:
    items = [str(number) for number in range(total)]
    return FanOut(name="a", deployment="a/d", over="item", items=items, allow_failed=allow_failed)


async def test_a_step_that_exceeds_its_timeout_is_cancelled_and_counts_as_timed_out(flow_runs: MemoryFlowRuns) -> None:
    slow = Step(name="slow", deployment="stuck/d", timeout=0.02)

    with pytest.raises(FlowRunsFailed) as caught:
        await run_phases([Phase(steps=[slow, publish()])], batch="b1", flow_runs=flow_runs)

    [outcome] = caught.value.outcomes
    assert (outcome.step, outcome.state_name) == ("slow", "TimedOut")
    assert "exceeded its timeout of 0.02 s" in outcome.message
    assert flow_runs.find("load").outcome is not None


@pytest.mark.parametrize("own", [None, 60.0])
async def test_the_timeout_of_the_pipeline_bounds_all_phases_together_and_is_named_as_such(
    flow_runs: MemoryFlowRuns, own: float | None
) -> None:
    phases = [Phase(steps=[publish()]), Phase(steps=[Step(name="slow", deployment="stuck/d", timeout=own)])]

    with pytest.raises(FlowRunsFailed, match="TimedOut") as caught:
        await run_phases(phases, batch="b1", timeout=0.05, flow_runs=flow_runs)

    assert "exceeded the timeout of 0.05 s that the whole pipeline has" in str(caught.value)


async def test_a_step_that_exceeds_its_own_timeout_first_is_not_blamed_on_the_pipeline(
    flow_runs: MemoryFlowRuns,
) -> None:
    slow = Step(name="slow", deployment="stuck/d", timeout=0.02)

    with pytest.raises(FlowRunsFailed, match=r"exceeded its timeout of 0\.02 s"):
        await run_phases([Phase(steps=[slow])], batch="b1", timeout=60, flow_runs=flow_runs)


async def test_a_crashed_step_is_run_again_once_before_it_counts(flow_runs: MemoryFlowRuns) -> None:
    crashes = iter([ProcessDied("killed")])

    async def fragile() -> None:
        for crash in crashes:
            raise crash

    runs = MemoryFlowRuns({"fragile/d": fragile})
    outcome = await run_phases(
        [Phase(steps=[Step(name="fragile", deployment="fragile/d")])], batch="b1", crash_retries=1, flow_runs=runs
    )

    assert outcome.is_completed
    assert runs.find("fragile").attempts == 2


async def test_a_step_that_keeps_crashing_fails_after_its_retries() -> None:
    async def fragile() -> None:
        raise ProcessDied("killed")

    runs = MemoryFlowRuns({"fragile/d": fragile})
    with pytest.raises(FlowRunsFailed, match="Crashed"):
        await run_phases(
            [Phase(steps=[Step(name="fragile", deployment="fragile/d")])], batch="b1", crash_retries=2, flow_runs=runs
        )

    assert runs.find("fragile").attempts == 3
