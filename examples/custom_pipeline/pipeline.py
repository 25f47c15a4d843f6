"""A pipeline of one's own: the built-in phases, a third flow in phase 1, and a phase 3 after publishing."""

import json
from typing import Any

from prefect import flow, get_run_logger

from phasewise import BATCH, PHASES, Phase, Step
from phasewise.lake.queries import fetch_int
from phasewise.lake.session import open_session
from phasewise.project.config import find_project, load_project
from phasewise.settings import Settings
from phasewise.sources import list_project_tables, open_source


@flow(name="profile-source")
def profile_source(batch_id: str) -> dict[str, Any]:
    """Count the rows of every table at the source while the tables are being loaded."""
    settings = Settings()
    project = load_project(find_project(settings))
    source = open_source(project, settings)
    with open_session(settings, extensions=source.extensions) as connection:
        source.attach(connection)
        rows = {
            name: fetch_int(connection, f"select count(*) from ({source.select(source.describe_table(name))})")
            for name in list_project_tables(project, source)
        }
    project.reports.mkdir(parents=True, exist_ok=True)
    (project.reports / f"{batch_id}.profile.json").write_text(json.dumps(rows, indent=1))
    get_run_logger().info("%d tables, %d rows at the source", len(rows), sum(rows.values()))
    return rows


@flow(name="prune-reports")
def prune_reports(keep: int = 30) -> int:
    """Post-final cleanup: remove all but the newest *keep* batches' reports and profiles."""
    project = load_project(find_project(Settings()))
    profiles = sorted(project.reports.glob("*.profile.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for profile in profiles[keep:]:
        batch = profile.name.removesuffix(".profile.json")
        for path in project.reports.glob(f"{batch}.*"):
            path.unlink()
    get_run_logger().info("%d old reports removed", len(profiles[keep:]))
    return len(profiles[keep:])


# A parallel flow is one more step; a phase is one more Phase. `phasewise deploy` deploys both.
load, publish = PHASES
PHASES = (
    load.with_step(
        Step(
            name="profile_source",
            deployment="profile-source/profile-source-deployment",
            entrypoint="pipeline.py:profile_source",
            parameters={"batch_id": BATCH},
        )
    ),
    publish,
    Phase(
        name="tidy",
        steps=[
            Step(
                name="prune_reports",
                deployment="prune-reports/prune-reports-deployment",
                entrypoint="pipeline.py:prune_reports",
            )
        ],
    ),
)
