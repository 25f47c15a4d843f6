"""A project with two tables, for the tests of this folder."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from phasewise.project.config import Project, load_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "phasewise.toml").write_text('[project]\nname = "t"\n[source]\nurl = "sqlite:///source.db"\n')
    with closing(sqlite3.connect(tmp_path / "source.db")) as source, source:
        source.execute("CREATE TABLE player (id INTEGER PRIMARY KEY, name TEXT)")
        source.executemany("INSERT INTO player VALUES (?, ?)", [(i, f"name {i}") for i in range(1000)])
        source.execute("CREATE TABLE team (id INTEGER PRIMARY KEY, city TEXT)")
    return load_project(tmp_path)
