"""What happened: the outcome of a step, of a phase and of a whole run, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

#: State types after which nothing more happens to a flow run by itself.
FINAL_TYPES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED", "LOST")


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """One flow run; final, where it comes from waiting."""

    #: Name of the flow run, such as ``process-table-etl/batting``.
    name: str
    run_id: str
    #: Prefect's state type: COMPLETED, FAILED, CRASHED, CANCELLED; or LOST when the server no longer knows the run.
    state_type: str
    #: Prefect's state name; says more than the type where the two differ, such as TimedOut.
    state_name: str
    message: str = ""
    #: When it was to start, which is when it began to wait for a worker.
    expected_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    #: Time spent running, over all attempts.
    seconds: float | None = None
    attempts: int = 1
    #: Phase and step that the pipeline declares for this run, its item in a fan-out, and run id of its parent.
    phase: str | None = None
    step: str | None = None
    item: str | None = None
    parent_id: str | None = None
    #: It did not complete, and the step's failure budget (``allow_failed``) covers that.
    is_tolerated: bool = False
    #: Page of the flow run in the Prefect UI.
    url: str | None = None
    #: What the flow returned when it was a small mapping: rows, bytes, seconds, …
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_completed(self) -> bool:
        return self.state_type == "COMPLETED"

    @property
    def is_final(self) -> bool:
        return self.state_type in FINAL_TYPES

    def describe(self) -> str:
        """Return one line: name, state, the page or else the id of the run, and the state's own message."""
        line = f"{self.name} {self.state_name} ({self.url or f'run {self.run_id}'})"
        return f"{line}: {self.message}" if self.message else line


@dataclass(frozen=True, kw_only=True)
class PhaseOutcome:
    """The steps of one phase, in the order of their declaration."""

    name: str
    steps: Sequence[StepOutcome]

    @property
    def is_completed(self) -> bool:
        return all(step.is_completed or step.is_tolerated for step in self.steps)

    @property
    def tolerated(self) -> list[StepOutcome]:
        """The steps that did not complete, within the failure budget of their fan-out."""
        return [step for step in self.steps if step.is_tolerated]


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """All phases that were started, in order; a phase that was never started is not in it."""

    batch: str
    phases: Sequence[PhaseOutcome]

    @property
    def is_completed(self) -> bool:
        return all(phase.is_completed for phase in self.phases)
