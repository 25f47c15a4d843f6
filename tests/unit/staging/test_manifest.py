"""Manifests: what counts as staged, and where it is."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, folder_name, list_manifests, staged_files

SETTINGS = Settings(threads=1, memory_limit="256MB", min_free_bytes=0)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner",))


def extract(project: Project, table: str, batch: str = "b1") -> Manifest:
    return extract_table(project, SETTINGS, batch=batch, table=table)


def count_rows(paths: list[Path]) -> int:
    with open_session(SETTINGS, extensions=()) as connection:
        return connection.execute("SELECT count(*) FROM read_parquet(?)", [list(map(str, paths))]).fetchone()[0]


@pytest.mark.parametrize("damage", ["missing file", "short file", "no json", "older version"])
def test_a_manifest_that_does_not_fit_its_files_is_not_complete(project: Project, damage: str):
    manifest = extract(project, "player")
    file = staged_files(project, manifest)[0]
    path = file.parent / "manifest.json"
    if damage == "missing file":
        file.unlink()
    elif damage == "short file":
        os.truncate(file, 10)
    elif damage == "no json":
        path.write_text("{")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))

    assert list_manifests(project, "b1") == []
    assert count_rows(staged_files(project, extract(project, "player"))) == 1000


def test_hard_table_names_are_staged_side_by_side(project: Project):
    names = ['we "ird', "a b", "select", "😀", "..", "a/b", "a\\b", "O'Hara", "UPPER", "x" * 300, "a-b", "a_b"]
    with closing(sqlite3.connect(project.root / "source.db")) as source, source:
        for index, name in enumerate(names):
            source.execute(f"CREATE TABLE {quote_identifier(name)} (n INTEGER)")
            source.execute(f"INSERT INTO {quote_identifier(name)} VALUES (?)", (index,))

    found = {}
    for name in names:
        files = staged_files(project, extract(project, name))
        with open_session(SETTINGS, extensions=()) as connection:
            found[name] = connection.execute("SELECT n FROM read_parquet(?)", [str(files[0])]).fetchall()

    assert found == {name: [(index,)] for index, name in enumerate(names)}
    assert sorted(m.table for m in list_manifests(project, "b1")) == sorted(names)
    assert all(path.parent == project.staging / "b1" for path in (project.staging / "b1").glob("*"))


def test_folder_names_differ_where_file_systems_do_not():
    folders = {folder_name(name).casefold() for name in ("people", "People", "PEOPLE", "people ")}

    assert len(folders) == 4
