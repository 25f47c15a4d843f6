"""Phasewise: multi-phase ETL on Prefect. Tables are staged in parallel, audited, and published all at once."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phasewise.errors import FlowRunsFailed as FlowRunsFailed
    from phasewise.errors import PhasewiseError as PhasewiseError
    from phasewise.orchestrator import run_phases as run_phases
    from phasewise.orchestrator import trigger_subflow as trigger_subflow
    from phasewise.orchestrator import wait_for_flow_runs as wait_for_flow_runs
    from phasewise.outcomes import PhaseOutcome as PhaseOutcome
    from phasewise.outcomes import RunOutcome as RunOutcome
    from phasewise.outcomes import StepOutcome as StepOutcome
    from phasewise.pipeline import BATCH as BATCH
    from phasewise.pipeline import PHASES as PHASES
    from phasewise.pipeline import FanOut as FanOut
    from phasewise.pipeline import Phase as Phase
    from phasewise.pipeline import Step as Step

__version__ = _version("phasewise")

_HOMES = {
    "run_phases": "orchestrator",
    "trigger_subflow": "orchestrator",
    "wait_for_flow_runs": "orchestrator",
    "PhaseOutcome": "outcomes",
    "RunOutcome": "outcomes",
    "StepOutcome": "outcomes",
    "FlowRunsFailed": "errors",
    "PhasewiseError": "errors",
    "BATCH": "pipeline",
    "PHASES": "pipeline",
    "FanOut": "pipeline",
    "Phase": "pipeline",
    "Step": "pipeline",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: the data plane and the forkserver import this package without paying for Prefect.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"phasewise.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
