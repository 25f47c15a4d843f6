"""The schema that new databases are created from is the one that Prefect's migrations make."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from phasewise.server.app import create_database

MIGRATE = """
import asyncio
from prefect.server.database.dependencies import provide_database_interface
asyncio.run(provide_database_interface().create_db())
"""


def migrate(path: Path) -> None:
    environment = {**os.environ, "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}"}
    subprocess.run([sys.executable, "-c", MIGRATE], env=environment, check=True)


def schema(path: Path) -> dict[str, list[str]]:
    """Return name → words of the definition, sorted: the migrations write constraints in an order of the moment."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        found = database.execute("select name, coalesce(sql, '') from sqlite_master").fetchall()
        revision = database.execute("select version_num from alembic_version").fetchone()[0]
    return {"revision": [revision], **{name: sorted(re.findall(r"\w+", sql)) for name, sql in found}}


@pytest.mark.timeout(180)
def test_a_database_from_the_schema_equals_one_from_the_migrations(tmp_path: Path) -> None:
    create_database(tmp_path / "ours.db")
    # Through the migrations as well: with a newer Prefect they go on from where the schema stands.
    migrate(tmp_path / "ours.db")
    migrate(tmp_path / "theirs.db")

    assert schema(tmp_path / "ours.db") == schema(tmp_path / "theirs.db")
