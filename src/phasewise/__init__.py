"""Phasewise: multi-phase ETL on Prefect. Tables are staged in parallel, audited, and published all at once."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phasewise.errors import FlowRunsFailed as FlowRunsFailed
    from phasewise.errors import PhasewiseError as PhasewiseError
    from phasewise.orchestration.phases import run_phases as run_phases
    from phasewise.orchestration.phases import trigger_subflow as trigger_subflow
    from phasewise.orchestration.phases import wait_for_flow_runs as wait_for_flow_runs
    from phasewise.outcomes import PhaseOutcome as PhaseOutcome
    from phasewise.outcomes import RunOutcome as RunOutcome
    from phasewise.outcomes import StepOutcome as StepOutcome
    from phasewise.project.pipeline import BATCH as BATCH
    from phasewise.project.pipeline import PHASES as PHASES
    from phasewise.project.pipeline import FanOut as FanOut
    from phasewise.project.pipeline import Phase as Phase
    from phasewise.project.pipeline import Step as Step

__version__ = _version("phasewise")

_HOMES = {
    "run_phases": "orchestration.phases",
    "trigger_subflow": "orchestration.phases",
    "wait_for_flow_runs": "orchestration.phases",
    "PhaseOutcome": "outcomes",
    "RunOutcome": "outcomes",
    "StepOutcome": "outcomes",
    "FlowRunsFailed": "errors",
    "PhasewiseError": "errors",
    "BATCH": "project.pipeline",
    "PHASES": "project.pipeline",
    "FanOut": "project.pipeline",
    "Phase": "project.pipeline",
    "Step": "project.pipeline",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: the data plane and the forkserver import this package without paying for Prefect.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"phasewise.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
