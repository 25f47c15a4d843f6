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
    "orchestration.phases": ("run_phases", "trigger_subflow", "wait_for_flow_runs"),
    "outcomes": ("PhaseOutcome", "RunOutcome", "StepOutcome"),
    "errors": ("FlowRunsFailed", "PhasewiseError"),
    "project.pipeline": ("BATCH", "PHASES", "FanOut", "Phase", "Step"),
}

__all__ = [*(name for names in _HOMES.values() for name in names), "__version__"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: the data plane and the forkserver import this package without paying for Prefect.
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"phasewise.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
