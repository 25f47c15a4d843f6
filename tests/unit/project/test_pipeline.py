from __future__ import annotations

from pathlib import Path

import pytest

from phasewise.errors import PipelineInvalid
from phasewise.project.pipeline import PHASES, FanOut, Phase, Step, load_phases, validate_phases


def step(name: str = "export", **options: str) -> Step:
    return Step(name=name, deployment=options.pop("deployment", f"{name}/{name}-deployment"), **options)  # type: ignore[arg-type]


def test_the_built_in_phases_are_valid() -> None:
    validate_phases(PHASES)


def test_a_step_is_added_to_a_phase_without_changing_the_original() -> None:
    longer = PHASES[0].with_step(step())

    assert [one.name for one in longer.steps] == ["pre_etl", "sub_etl", "export"]
    assert len(PHASES[0].steps) == 2


def test_all_problems_of_a_pipeline_are_named_at_once() -> None:
    broken = [Phase(steps=[]), Phase(steps=[step("a"), step("a")]), Phase(steps=[step("b", deployment="no-slash")])]

    with pytest.raises(PipelineInvalid) as caught:
        validate_phases(broken)

    message = str(caught.value)
    assert "phase 1 has no step" in message
    assert 'two steps have the name "a"' in message
    assert '"no-slash" is not written flow/deployment' in message


def test_a_step_with_the_name_of_one_below_another_step_is_refused() -> None:
    once_more = step("cleanup_flow1", deployment="cleanup-flow-1/cleanup-flow-1-deployment")

    with pytest.raises(PipelineInvalid, match='two steps have the name "cleanup_flow1"'):
        validate_phases([*PHASES, Phase(steps=[once_more])])


def test_a_fan_out_with_an_item_twice_is_refused() -> None:
    fan_out = FanOut(name="load", deployment="load/load-deployment", over="table", items=["people", "people"])

    with pytest.raises(PipelineInvalid, match='item "people" is listed twice'):
        validate_phases([Phase(steps=[fan_out])])


def test_a_pipeline_without_phases_is_refused() -> None:
    with pytest.raises(PipelineInvalid, match="it has no phase"):
        validate_phases([])


def test_a_project_brings_its_own_phases_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(
        "from phasewise import PHASES, Phase, Step\n"
        "extra = Step(name='tidy', deployment='tidy/tidy-deployment', entrypoint='pipeline.py:tidy')\n"
        "phases = [*PHASES, Phase(name='post', steps=[extra])]\n"
    )

    phases = load_phases(tmp_path, "pipeline.py:phases")

    assert [phase.name for phase in phases] == ["load", "publish", "post"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("missing.py:phases", "cannot be imported"),
        ("no_such_module_at_all:phases", "cannot be imported"),
        ("pipeline.py:nothing", "does not name a list of Phase"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "pipeline.py").write_text("nothing = 3\n")

    with pytest.raises(PipelineInvalid, match=message):
        load_phases(tmp_path, reference)
