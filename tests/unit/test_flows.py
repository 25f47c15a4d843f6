from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prefect import Flow

from phasewise import flows
from phasewise.errors import PhasewiseError, SourceUnavailable
from phasewise.local.engine import entering_flow_run
from phasewise.orchestration import deadlock
from phasewise.orchestration.deployments import list_deployments
from phasewise.orchestration.flow_runs import LocalRun
from phasewise.project.config import Project
from phasewise.project.pipeline import MAIN_ETL, PHASES, SUB_ETL, FanOut, Phase, Step, list_steps
from phasewise.testing.flow_runs import MemoryFlowRuns
from phasewise.testing.projects import write_project

SOURCE = "CREATE TABLE a (n INTEGER); INSERT INTO a VALUES (1); CREATE TABLE b (n INTEGER); INSERT INTO b VALUES (2);"
RUN_ID = "00000000-0000-4000-8000-000000000001"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PHASEWISE_PROJECT", str(tmp_path))
    monkeypatch.setenv("PHASEWISE_MIN_FREE_BYTES", "0")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return write_project(tmp_path, source=SOURCE)


async def run_recorded(flow: Flow[[], object]) -> list[set[str]]:
    """Return the deployments that *flow* runs, phase by phase: those submitted at once."""
    phases: list[set[str]] = []

    class Recorded(MemoryFlowRuns):
        async def submit(self, requests: Sequence) -> list[str]:  # type: ignore[type-arg]
            phases.append({request.deployment for request in requests})
            return await super().submit(requests)

    async def nothing(**_: object) -> None:
        return None

    flow_runs = Recorded(dict.fromkeys([one.full_name for one in list_deployments((), Path())], nothing))
    with entering_flow_run(LocalRun(run_id=RUN_ID, flow_runs=flow_runs, read_runs=list), name=flow.name):
        await flow.fn()
    return phases


def checked_below(name: str) -> list[set[str]]:
    """Return the deployments that the deadlock check sees below the run *name* of the built-in pipeline, by phase."""

    def find(node: deadlock._Node) -> deadlock._Node | None:
        below = [child for phase in node.phases for child in phase]
        return node if node.name.endswith(name) else next(filter(None, map(find, below)), None)

    found = find(deadlock._build_node(replace(MAIN_ETL, phases=PHASES), 1, {}))
    assert found is not None
    deployments = {step.deployment for step in (MAIN_ETL, *list_steps(PHASES))}
    return [
        {one for one in deployments for step in phase if f'deployment "{one}"' in step.needs} for phase in found.phases
    ]


async def test_what_sub_etl_runs_is_what_the_deadlock_check_sees(project: Project) -> None:
    ran = await run_recorded(flows.sub_etl)

    assert ran == checked_below("sub_etl")
    assert [len(phase) for phase in ran] == [1, 2]


async def test_what_main_etl_runs_is_what_the_deadlock_check_sees(project: Project) -> None:
    assert await run_recorded(flows.main_etl) == checked_below("main_etl") != []


def test_what_a_built_in_flow_runs_is_known_when_a_pipeline_names_its_deployment_alone() -> None:
    bare = Step(name="load", deployment=SUB_ETL.deployment, work_queue="orchestrators")
    node = deadlock._build_node(replace(MAIN_ETL, phases=(Phase(steps=(bare,)),)), 1, {})

    [[load]] = node.phases

    assert [len(phase) for phase in load.phases] == [1, 2]


def test_the_flows_are_those_of_the_table() -> None:
    table = {step.name: step.flow_name for step in (MAIN_ETL, *list_steps(PHASES))}

    assert {name: one.name for name, one in vars(flows).items() if isinstance(one, Flow)} == table
    assert len(table) == 7


def test_a_fan_out_of_the_table_has_no_items_before_a_batch_has_begun() -> None:
    assert [step.items for step in list_steps(PHASES) if isinstance(step, FanOut)] == [()]


# ── called without a server ───────────────────────────────────────────────────────────────────────────────────────


def test_a_table_is_staged_by_a_plain_call(project: Project) -> None:
    staged = flows.process_table_etl("a")

    assert (staged["table"], staged["rows"]) == ("a", 1)


@pytest.mark.parametrize(
    ("error", "attempts"), [(SourceUnavailable("away"), 3), (OSError("reset"), 3), (PhasewiseError("wrong"), 1)]
)
def test_a_plain_call_tries_again_what_may_pass_and_nothing_else(
    project: Project, monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int
) -> None:
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(flows, "extract_table", fail)
    monkeypatch.setattr("time.sleep", lambda _: None)

    with pytest.raises(type(error), match=str(error)):
        flows.process_table_etl("a")

    assert len(calls) == attempts
