"""The exceptions of Phasewise: one class per thing that a caller can do something about.

Messages say what happened, to which item, and what to do next. They never carry a password: whoever puts a URL
into a message passes it through ``phasewise.project.urls.redact_url`` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phasewise.outcomes import StepOutcome


#: How many flow runs an error describes in full: its text goes into the state of every run above.
_DESCRIBED = 50


class PhasewiseError(Exception):
    """Base of all errors that Phasewise raises on purpose.

    ``hint`` is the next step for the user; it is part of the message, on the same line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} {hint}" if hint else message)


class ProjectError(PhasewiseError):
    """phasewise.toml is missing, malformed or contradicts itself."""


class ProjectNotFound(ProjectError):
    """No folder with a phasewise.toml was found."""


class UnknownTable(ProjectError):
    """A table was named that the project does not have."""

    def __init__(self, table: str, *, hint: str | None = None) -> None:
        self.table = table
        super().__init__(f'The project has no table "{table}".', hint=hint)


class SourceError(PhasewiseError):
    """Something is wrong with a source database."""


class SourceUnavailable(SourceError):
    """The source does not answer, is missing, locked or not a database."""


class TableMissing(SourceError):
    """The source answers but lacks a table of the project."""

    def __init__(self, table: str, *, hint: str | None = None) -> None:
        self.table = table
        super().__init__(f'The source has no table "{table}".', hint=hint)


class SchemaDrift(SourceError):
    """A column of the contract is missing or changed its type."""


class UnfaithfulValue(SourceError):
    """A value has no faithful place in the type that its column would get in the warehouse."""


class StagingError(PhasewiseError):
    """Staging cannot be written (full disk, read-only), or what is in it is not complete."""


class NothingStaged(StagingError):
    """There is no staged batch that could be published."""


class AuditFailed(PhasewiseError):
    """A blocking audit found bad rows, so nothing was published."""


class LakeError(PhasewiseError):
    """Something is wrong with the warehouse."""


class WarehouseTooNew(LakeError):
    """The warehouse was written by a newer version than this one."""


class WarehouseBusy(LakeError):
    """Another process is writing to the warehouse."""


class PublishConflict(LakeError):
    """The batch cannot be published as asked."""


class ReportError(PhasewiseError):
    """The report of a batch cannot be written; what was published stays published."""


class OrchestrationError(PhasewiseError):
    """Something is wrong with flow runs, deployments or the work pool."""


class ServerUnreachable(OrchestrationError):
    """The Prefect server does not answer."""


class DeploymentMissing(OrchestrationError):
    """A deployment that a step needs does not exist on the server."""


class NoWorkerOnline(OrchestrationError):
    """No worker of the work pool is online, so nothing would start."""


class PipelineInvalid(OrchestrationError):
    """The phases cannot run as they are declared."""


class BatchRunning(OrchestrationError):
    """Another batch of the project is running."""


class BatchCancelled(OrchestrationError):
    """The batch that this process ran was cancelled."""


class UnknownBatch(OrchestrationError):
    """The server knows no such batch."""


class FlowRunsFailed(OrchestrationError):
    """Flow runs that were waited for did not complete.

    ``outcomes`` has one entry per flow run that did not complete, in the order asked for. The message names each
    with its state, its own message and its run id.
    """

    def __init__(self, outcomes: Sequence[StepOutcome]) -> None:
        self.outcomes = tuple(outcomes)
        count = len(self.outcomes)
        noun = "flow run" if count == 1 else "flow runs"
        details = "; ".join(outcome.describe() for outcome in self.outcomes[:_DESCRIBED])
        more = f"; and {count - _DESCRIBED} more" if count > _DESCRIBED else ""
        super().__init__(f"{count} {noun} did not complete: {details}{more}")

    def blames_source(self) -> bool:
        """Tell whether one failed for what no retry fixes before someone has changed the source."""
        names = [error.__name__ for error in (TableMissing, SchemaDrift, UnfaithfulValue)]
        return any(name in outcome.message for outcome in self.outcomes for name in names)


def combine_errors(errors: Sequence[PhasewiseError]) -> PhasewiseError:
    """Return one error that names all of *errors*, of which there is at least one."""
    if len(errors) == 1:
        return errors[0]
    lines = "\n".join(f"- {error}" for error in errors)
    return PhasewiseError(f"{len(errors)} checks failed:\n{lines}")
