"""The records of a report, and what they are made of."""

from __future__ import annotations

from phasewise.outcomes import StepOutcome
from phasewise.report.records import RunSpan
from tests.unit.report.reports import at


def test_what_the_server_told_becomes_a_span() -> None:
    outcome = StepOutcome(
        name="process-table-etl/batting",
        run_id="1",
        state_type="FAILED",
        state_name="TimedOut",
        started_at=at(1),
        ended_at=at(3),
        parent_id="0",
    )

    span = RunSpan.from_outcome(outcome)

    assert (span.flow, span.parent, span.kind) == ("process-table-etl", "0", "failed")
