"""Warehouses of every kind for tests: a catalog in SQLite or PostgreSQL, files in a folder or on S3."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

HOST = os.environ.get("PGHOST", "127.0.0.1")


def psql(sql: str) -> str:
    command = ["psql", "-h", HOST, "-U", "postgres", "-d", "test", "-v", "ON_ERROR_STOP=1", "-qAt"]
    environment = {**os.environ, "PGOPTIONS": "-c client_min_messages=error"}
    return subprocess.run(command, input=sql, text=True, capture_output=True, check=True, env=environment).stdout


def is_postgres_reachable() -> bool:
    try:
        return psql("SELECT 1").strip() == "1"
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def postgres_catalog() -> Iterator[str]:
    """Yield the URL of a catalog in PostgreSQL that does not exist yet; drop it afterwards."""
    url = f"postgresql://postgres:a%20secret@{HOST}:5432/test?schema=pw_lake_{uuid.uuid4().hex[:10]}"
    try:
        yield url
    finally:
        drop_catalog(url)


def drop_catalog(url: str | None) -> None:
    """Drop the schema of a catalog in PostgreSQL; nothing where *url* is none."""
    if url is not None:
        psql(f"DROP SCHEMA IF EXISTS {url.rpartition('=')[2]} CASCADE")
