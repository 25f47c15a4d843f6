"""What a report is made of: plain records, so that the page knows neither Prefect nor DuckDB.

Times are aware datetimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from phasewise.outcomes import StepOutcome
from phasewise.project.config import Severity

BatchStatus = Literal["published", "failed", "renewed"]
RunKind = Literal["completed", "failed", "cancelled", "running", "waiting"]


@dataclass(frozen=True, kw_only=True)
class RunSpan:
    """One flow run on the clock."""

    #: Name of the flow run, such as ``process-table-etl/batting``.
    name: str
    #: Name of its flow, such as ``process-table-etl``.
    flow: str
    run_id: str
    #: Prefect's state name: Completed, Failed, Crashed, Cancelled, TimedOut, Running, Pending, Scheduled, …
    state: str
    #: Id of the run that triggered it; None for the first one.
    parent: str | None = None
    #: Phase that its pipeline declares for it; None outside of a pipeline, and for the first run.
    phase: str | None = None
    #: When it was to start, which is when it began to wait for a worker.
    expected_start: datetime | None = None
    #: When its first attempt started to run.
    started_at: datetime | None = None
    #: When its last attempt ended; None while it runs.
    ended_at: datetime | None = None
    #: Seconds in Running over all attempts, where that is less than the time from start to end.
    seconds: float | None = None
    attempts: int = 1
    #: Page of the flow run in the Prefect UI.
    url: str | None = None

    @classmethod
    def from_outcome(cls, run: StepOutcome) -> RunSpan:
        """Return what the server told of *run*; its flow is read off its name, ``<flow>/<item>``."""
        return cls(
            name=run.name,
            flow=run.name.partition("/")[0],
            run_id=run.run_id,
            state=run.state_name,
            parent=run.parent_id,
            phase=run.phase,
            expected_start=run.expected_at,
            started_at=run.started_at,
            ended_at=run.ended_at,
            seconds=run.seconds,
            attempts=max(run.attempts, 1),
            url=run.url,
        )

    @property
    def kind(self) -> RunKind:
        """Return what the state's name comes down to for someone who looks at it."""
        return _KINDS.get(self.state.replace(" ", "").casefold(), "waiting")


_KINDS: dict[str, RunKind] = {
    "completed": "completed",
    "cached": "completed",
    "rolledback": "failed",
    "failed": "failed",
    "crashed": "failed",
    "timedout": "failed",
    "lost": "failed",
    "cancelled": "cancelled",
    "cancelling": "cancelled",
    "running": "running",
    "retrying": "running",
}


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """One table of the batch."""

    name: str
    rows: int
    #: Bytes on disk, compressed.
    size_bytes: int
    #: Seconds that its extraction took; the sum over its partitions.
    seconds: float
    #: ``published``; ``kept`` when it failed within a budget and readers still see its last good version; ``staged``
    #: when the batch was not published.
    status: str = "published"
    #: What a reader of the table should know, such as a column that is carried as text.
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """One audit and the first of its bad rows."""

    name: str
    table: str | None
    severity: Severity
    passed: bool
    #: How many rows broke it; may be more than *sample* has.
    bad_rows: int = 0
    columns: Sequence[str] = ()
    #: The first bad rows; values in the order of *columns*.
    sample: Sequence[Sequence[Any]] = ()
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MartReport:
    """One mart: its rows, and which two of its columns its chart shows."""

    name: str
    title: str
    columns: Sequence[str]
    #: Values in the order of *columns*; numbers, text, booleans, dates or None.
    rows: Sequence[Sequence[Any]]
    chart: Literal["bar", "line", "scatter"] = "bar"
    #: Default: the first column.
    x: str | None = None
    #: Default: the first column of numbers that is not *x*.
    y: str | None = None
    #: Rows of the whole mart, where *rows* has only the first of them.
    total_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """Everything that the report of one batch shows."""

    project: str
    batch: str
    #: ``renewed``: nothing was staged, so the published snapshot was audited again and its marts built again.
    status: BatchStatus
    started_at: datetime
    #: When the report was written; runs without an end were still running then.
    ended_at: datetime
    snapshot: int | None = None
    #: What went wrong, or what a reader should know; shown at the top.
    message: str = ""
    #: URL of the source, without its password.
    source: str = ""
    #: Folder or URL of the warehouse, without its password.
    warehouse: str = ""
    runs: Sequence[RunSpan] = ()
    tables: Sequence[TableReport] = ()
    audits: Sequence[AuditReport] = ()
    marts: Sequence[MartReport] = ()
    #: Versions of phasewise, prefect, duckdb, …
    versions: Mapping[str, str] = field(default_factory=dict)
