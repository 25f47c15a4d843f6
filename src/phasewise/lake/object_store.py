"""Files on S3-compatible storage, read and written by DuckDB's httpfs; ``AWS_*`` says where, and who we are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

import duckdb

from phasewise.errors import ProjectError, StagingError
from phasewise.lake.quoting import quote_literal
from phasewise.project.urls import split_url

#: Files that Phasewise puts among those of the lake begin with it; DuckLake's own begin with ``ducklake-``.
FILE_PREFIX = "phasewise-"


@dataclass(frozen=True, order=True)
class StoredFile:
    """A file on S3; of a path it has what the data plane asks of one."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> StoredFile:
        return StoredFile(self.url.rpartition("/")[0])


#: A file of the lake or of staging, on a disk or on S3.
File: TypeAlias = Path | StoredFile


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What a listing says about one file."""

    size_bytes: int
    #: When the upload ended; before that nobody sees the file.
    modified_at: datetime


def is_stored(location: str) -> bool:
    """Tell whether *location* is a URL on S3, and not a path."""
    return location.startswith("s3://")


def create_storage_secret(connection: duckdb.DuckDBPyConnection) -> None:
    """Let *connection* use S3 with the standard variables of the environment, which no message and no file shows.

    ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION`` (or ``AWS_DEFAULT_REGION``),
    ``AWS_ENDPOINT_URL_S3`` (or ``AWS_ENDPOINT_URL``) for a storage that is not Amazon's.

    Raises:
        ProjectError: the endpoint is not a URL.
    """
    fields = {
        "key_id": os.environ.get("AWS_ACCESS_KEY_ID"),
        "secret": os.environ.get("AWS_SECRET_ACCESS_KEY"),
        "session_token": os.environ.get("AWS_SESSION_TOKEN"),
        "region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        **_read_endpoint(),
    }
    given = "".join(f", {name} {quote_literal(value)}" for name, value in fields.items() if value)
    connection.execute(f"CREATE OR REPLACE SECRET phasewise_storage (TYPE s3{given})")


def list_stored(connection: duckdb.DuckDBPyConnection, pattern: str) -> dict[StoredFile, Listed]:
    """Return the files that *pattern*, which must have a wildcard, matches; their contents are not read."""
    query = f"SELECT filename, size, last_modified FROM read_blob({quote_literal(pattern)})"
    try:
        rows = connection.execute(query).fetchall()
    except duckdb.IOException as exc:
        if "No files found" in str(exc):
            return {}
        raise
    return {StoredFile(row[0]): Listed(size_bytes=int(row[1]), modified_at=row[2]) for row in rows}


def read_etag(connection: duckdb.DuckDBPyConnection, file: StoredFile) -> str | None:
    """Return size and ETag of *file*, such as ``1024-etag-"9a0364"``; None when it is not there.

    The storage makes an ETag of the bytes that it was given. DuckDB 1.5 shows it in the log of its requests alone.
    """
    connection.execute("CALL enable_logging('HTTP')")
    try:
        rows = connection.execute(f"SELECT size FROM read_blob({quote_literal(file.url)})").fetchall()
        answers = connection.execute(
            "SELECT response.headers FROM duckdb_logs_parsed('HTTP') WHERE request.type = 'HEAD'"
        ).fetchall()
    except (duckdb.HTTPException, duckdb.IOException) as exc:
        if "404" in str(exc) or "No files found" in str(exc):
            return None
        raise
    finally:
        # What was logged has the signatures of requests in it.
        connection.execute("CALL disable_logging()")
        connection.execute("CALL truncate_duckdb_logs()")
    etags = [value for (headers,) in answers for name, value in headers.items() if name.lower() == "etag"]
    return f"{rows[0][0]}-etag-{''.join(etags[-1:])}"


def explain_storage(file: StoredFile, exc: Exception) -> StagingError | None:
    """Return what *exc* means when it comes of writing *file*; None when it is of something else."""
    if isinstance(exc, duckdb.OutOfMemoryException) or split_url(file.url).path.rpartition("/")[0] not in str(exc):
        return None
    return StagingError(
        f"Staging {file.parent} cannot be written: {str(exc).splitlines()[0].rstrip('.')}.",
        hint="Check the bucket of [warehouse] data, and the variables AWS_* where the workers run; then resume.",
    )


def _read_endpoint() -> dict[str, str]:
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return {}
    parts = split_url(url, "https://s3.example.com")
    if parts.scheme not in {"http", "https"} or not parts.netloc or "@" in parts.netloc:
        raise ProjectError(
            "The endpoint of the S3 storage is not a URL such as https://s3.example.com.",
            hint="Fix AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where the command and the workers run.",
        )
    # Buckets as host names need DNS entries that storage of one's own mostly lacks.
    is_safe = "true" if parts.scheme == "https" else "false"
    return {"endpoint": f"{parts.netloc}{parts.path.rstrip('/')}", "url_style": "path", "use_ssl": is_safe}
