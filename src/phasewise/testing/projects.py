"""Small real projects for tests, ours and those of projects built on Phasewise: a SQLite source and a warehouse."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from phasewise.lake.publications import Publication
from phasewise.project.config import Project, load_project
from phasewise.publishing.audit_batch import AuditedBatch, audit_batch
from phasewise.publishing.publish import publish_batch
from phasewise.publishing.session import open_auditor
from phasewise.settings import Settings
from phasewise.sources import list_project_tables, open_source
from phasewise.staging.batch import begin_batch, new_batch_id, read_batch
from phasewise.staging.extract import extract_table

#: One thread and little memory: what small data needs.
SAMPLE_SETTINGS = Settings(threads=1, memory_limit="256MB", min_free_bytes=0, lock_timeout=20)


def write_project(root: Path, *, source: str, toml: str = "", marts: Mapping[str, str] | None = None) -> Project:
    """Write a project into the folder *root* and load it.

    *source* is the SQL that fills its SQLite database, *toml* what phasewise.toml says besides the source, and
    *marts* has the SQL of each mart by name.
    """
    (root / "phasewise.toml").write_text(
        f'[project]\nname = "sample"\n[source]\nurl = "sqlite:///source.sqlite"\n{toml}', encoding="utf-8"
    )
    change_source(root, source)
    (root / "marts").mkdir(exist_ok=True)
    for name, sql in (marts or {}).items():
        (root / "marts" / f"{name}.sql").write_text(sql, encoding="utf-8")
    return load_project(root)


def change_source(root: Path, sql: str) -> None:
    """Run *sql*, one or more statements, on the source of the project in *root*."""
    with closing(sqlite3.connect(root / "source.sqlite")) as database:
        database.executescript(sql)


def stage_batch(project: Project, settings: Settings = SAMPLE_SETTINGS, *, batch: str | None = None) -> str:
    """Stage every table of *project* as one batch, a new one unless *batch* is given; return its id."""
    batch = batch or new_batch_id()
    plan = begin_batch(project, batch, list_project_tables(project, open_source(project, settings)))
    for table in plan.tables:
        extract_table(project, settings, batch=batch, table=table)
    return batch


def audit_sample(
    project: Project, batch: str, settings: Settings = SAMPLE_SETTINGS, *, is_partial: bool = False
) -> AuditedBatch:
    """Audit *batch* as ``final_etl`` does."""
    with open_auditor(project, settings) as session:
        return audit_batch(session, read_batch(project, batch), is_partial=is_partial)


def publish_sample(project: Project, settings: Settings, batch: str, *, is_partial: bool = False) -> Publication:
    """Audit and publish *batch* as ``final_etl`` does.

    Raises:
        AuditFailed: a blocking audit found bad rows.
    """
    return publish_batch(project, settings, audit_sample(project, batch, settings, is_partial=is_partial))
