"""What runs when: phases in order, the steps of a phase in parallel. Plain records; nothing here talks to a server."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from phasewise.errors import PipelineInvalid
from phasewise.project.config import count_share

#: As a parameter's value it stands for the id of the batch that is running.
BATCH = "{batch}"
#: Tag of a task run that stands for all flow runs of a fan-out, and whose state their parent sets.
FAN_OUT_TAG = "phasewise.fan-out"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One flow run of one deployment.

    A step that runs a flow of your own names its code too, so that ``phasewise deploy`` can deploy it::

        Step(name="export", deployment="export-marts/export-marts-deployment", entrypoint="pipeline.py:export")
    """

    #: Unique in its pipeline, with the steps of its steps; also the prefix of ``<name>_run_id`` in what the flow that
    #: orchestrates them returns.
    name: str
    #: ``flow name/deployment name``, as Prefect writes it.
    deployment: str
    #: Passed to the flow; ``BATCH`` is replaced by the batch's id.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: Where the flow's code is: ``file.py:function`` below the project's folder, or ``module.function``.
    entrypoint: str | None = None
    #: Work queue of the deployment: ``orchestrators`` for a flow that waits for others, else ``tables``.
    work_queue: Literal["orchestrators", "tables"] = "tables"
    #: Seconds from its triggering after which the step is cancelled and counts as TimedOut; None: no limit.
    timeout: float | None = None
    #: What the step's own flow runs, where it waits for flow runs itself: the preflight counts the slots they need.
    phases: Sequence[Phase] = ()

    @property
    def flow_name(self) -> str:
        return self.deployment.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class FanOut(Step):
    """One flow run per item, all in parallel: ``process-table-etl/batting``, ``process-table-etl/people``, …"""

    #: Name of the parameter that gets the item.
    over: str
    #: In the order in which they are started.
    items: Sequence[str]
    #: The parameters of those items that are a part of something, such as a partition of a table: *over* among them,
    #: which says of what. Any other item is itself the value of *over*.
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: How many items may fail without failing the step: a number, or a share of them such as ``"10%"``. The parts of
    #: one thing count once.
    allow_failed: int | str = 0

    def find_parameters(self, item: str) -> Mapping[str, Any]:
        """Return the parameters that *item* has and others have not."""
        return self.parts.get(item) or {self.over: item}

    def find_whole(self, item: str) -> str:
        """Return what *item* is a part of, or itself."""
        return str(self.find_parameters(item)[self.over])

    def count_allowed(self) -> int:
        """Return how many items may fail; a share is rounded down.

        Raises:
            PipelineInvalid: *allow_failed* is neither a number from 0 on nor a percentage from 0 to 100.
        """
        try:
            return count_share(self.allow_failed, len({self.find_whole(item) for item in self.items}))
        except ValueError as exc:
            raise PipelineInvalid(f"allow_failed = {exc}.") from exc


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that run in parallel. The next phase starts when all of them have completed."""

    steps: Sequence[Step]
    #: What the report and the terminal call it; without one it is ``Phase 1``, ``Phase 2``, … by its place.
    name: str = ""
    #: When a step fails: ``wait`` lets its siblings finish (their work is kept for a resume), ``cancel`` ends them.
    on_failure: Literal["wait", "cancel"] = "wait"

    def with_step(self, step: Step) -> Phase:
        """Return this phase with one more step next to the others."""
        return replace(self, steps=(*self.steps, step))


# ── the seven flows of Phasewise: their names, their deployments, and what each of them runs ──────────────────────


def _built_in(function: str, flow: str, work_queue: str) -> dict[str, Any]:
    return {
        "name": function,
        "deployment": f"{flow}/{flow.removesuffix('-job')}-deployment",
        "parameters": {"batch_id": BATCH},
        "entrypoint": f"phasewise.flows.{function}",
        "work_queue": work_queue,
    }


#: Its items are known when a batch has begun: the tables, or the parts of those that are split.
PROCESS_TABLE_ETL = FanOut(**_built_in("process_table_etl", "process-table-etl", "tables"), over="table", items=())
CLEANUP_FLOW1 = Step(**_built_in("cleanup_flow1", "cleanup-flow-1", "tables"))
CLEANUP_FLOW2 = Step(**_built_in("cleanup_flow2", "cleanup-flow-2", "tables"))
PRE_ETL = Step(**_built_in("pre_etl", "pre-etl-job", "orchestrators"))
SUB_ETL = Step(
    **_built_in("sub_etl", "sub-etl-job", "orchestrators"),
    phases=(
        Phase(name="tables", steps=(PROCESS_TABLE_ETL,)),
        Phase(name="cleanup", steps=(CLEANUP_FLOW1, CLEANUP_FLOW2)),
    ),
)
FINAL_ETL = Step(**_built_in("final_etl", "final-etl-job", "orchestrators"))

#: The built-in pipeline of ``main_etl``.
PHASES: tuple[Phase, ...] = (Phase(name="load", steps=(PRE_ETL, SUB_ETL)), Phase(name="publish", steps=(FINAL_ETL,)))
#: The flow that a batch is a run of.
MAIN_ETL = replace(Step(**_built_in("main_etl", "main-etl-job", "orchestrators")), parameters={}, phases=PHASES)


def load_phases(root: Path, reference: str | None) -> tuple[Phase, ...]:
    """Return the phases that *reference* (``file.py:NAME`` below *root*, or ``module:NAME``) names.

    Without a reference these are the built-in ``PHASES``.

    Raises:
        PipelineInvalid: the file, the module or the name is missing, or is not a sequence of phases.
    """
    if reference is None:
        return PHASES
    location, _, name = reference.partition(":")
    phases = getattr(_import_module(root, location, reference), name or "PHASES", None)
    if not isinstance(phases, Sequence) or not all(isinstance(phase, Phase) for phase in phases):
        raise PipelineInvalid(f'pipeline.phases = "{reference}" does not name a list of Phase in {location}.')
    validate_phases(phases)
    return tuple(phases)


def _import_module(root: Path, location: str, reference: str) -> ModuleType:
    try:
        if not location.endswith(".py"):
            return importlib.import_module(location)
        return _import_file(root / location)
    except (ImportError, FileNotFoundError) as exc:
        raise PipelineInvalid(f'pipeline.phases = "{reference}" cannot be imported: {exc}.') from exc


def _import_file(path: Path) -> ModuleType:
    name = f"phasewise_project_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as the import statement does: dataclasses and pickling look it up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def validate_phases(phases: Sequence[Phase]) -> None:
    """Check that the phases can be run.

    Raises:
        PipelineInvalid: there is no phase, a phase has no step, two steps have one name, a deployment is not
            written ``flow/deployment``, or a fan-out has an item twice. All problems are in the message.
    """
    problems = list(_find_problems(phases))
    if problems:
        raise PipelineInvalid("The pipeline cannot run: " + "; ".join(problems) + ".")


def list_steps(phases: Sequence[Phase]) -> Iterator[Step]:
    """Yield the steps of *phases*, then those that their own flows run, level by level."""
    while phases:
        steps = [step for phase in phases for step in phase.steps]
        yield from steps
        phases = [phase for step in steps for phase in find_phases(step)]


def find_phases(step: Step) -> Sequence[Phase]:
    """Return the phases that the flow of *step* runs: those of Phasewise's own are known without being declared."""
    if step.phases or step.entrypoint is not None:
        return step.phases
    built_in = [MAIN_ETL, *list_steps(MAIN_ETL.phases)]
    return next((one.phases for one in built_in if one.deployment == step.deployment), ())


def _find_problems(phases: Sequence[Phase]) -> list[str]:
    problems = [] if phases else ["it has no phase"]
    problems += [f"phase {number} has no step" for number, phase in enumerate(phases, start=1) if not phase.steps]
    # At any depth: batch and name are the key of a flow run, so a second step of one name would be the first one's run.
    steps = list(list_steps(phases))
    names = [step.name for step in steps]
    problems += [f'two steps have the name "{name}"' for name in sorted({n for n in names if names.count(n) > 1})]
    return problems + [problem for step in steps for problem in _find_step_problems(step)]


def _find_step_problems(step: Step) -> list[str]:
    problems = []
    flow, _, deployment = step.deployment.partition("/")
    if not flow or not deployment:
        problems.append(f'step "{step.name}": deployment "{step.deployment}" is not written flow/deployment')
    if isinstance(step, FanOut):
        twice = sorted({item for item in step.items if list(step.items).count(item) > 1})
        problems += [f'step "{step.name}": item "{item}" is listed twice' for item in twice]
        try:
            step.count_allowed()
        except PipelineInvalid as exc:
            problems.append(f'step "{step.name}": {str(exc).rstrip(".")}')
    if step.timeout is not None and step.timeout <= 0:
        problems.append(f'step "{step.name}": a timeout of {step.timeout} s would never let it run')
    return problems
