"""Projects on a source, and what arrives of their tables, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from phasewise.lake.session import open_session, read_parquet
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.staging.batch import new_batch_id
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import staged_files

SETTINGS = Settings(threads=2, memory_limit="256MB")


def make_project(root: Path, url: str, more: str = "") -> Project:
    (root / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n{more}')
    return load_project(root)


def read(project: Project, table: str) -> tuple[list[str], list[tuple]]:
    manifest = extract_table(project, SETTINGS, batch=new_batch_id(), table=table)
    assert manifest.rows == manifest.source_rows
    with open_session(SETTINGS, extensions=()) as connection:
        result = connection.execute(f"FROM {read_parquet(staged_files(project, manifest))} ORDER BY 1")
        assert [str(column[1]) for column in result.description] == [column.type for column in manifest.columns]
        return [column.type for column in manifest.columns], result.fetchall()
