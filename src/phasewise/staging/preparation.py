"""What must hold before a batch can be staged and published: the source, its tables, staging and the warehouse."""

from __future__ import annotations

from phasewise.errors import PhasewiseError, combine_errors
from phasewise.lake.warehouse import prepare_lake
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.sources import check_project, list_project_tables, open_source
from phasewise.staging.batch import prepare_staging


def prepare_batch(project: Project, settings: Settings) -> list[str]:
    """Check the source and prepare staging and warehouse; return the tables of the project, in name order.

    Raises:
        PhasewiseError: something is wrong; one error names all of it, not only the first.
    """
    problems = check_project(project, settings)
    for prepare in (prepare_staging, prepare_lake):
        try:
            prepare(project, settings)
        except PhasewiseError as exc:
            problems.append(exc)
    if problems:
        raise combine_errors(problems)
    return list_source_tables(project, settings)


def list_source_tables(project: Project, settings: Settings) -> list[str]:
    """Return the tables of the project as the source has them now, in name order.

    Raises:
        SourceError: the source does not answer.
        ProjectError: two tables differ by case only.
    """
    return list_project_tables(project, open_source(project, settings))
