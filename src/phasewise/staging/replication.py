"""Replicate the small files of staging, through the catalog's database, to machines that share no folder.

Rows are on S3 from the start. Plan, manifests and the like are files in the staging folder of each machine: what one
writes is stored in a table next to DuckLake's, and readers fetch it first. Where staging is in the folder of one
machine, or in one that all machines reach, nothing is replicated, and the files are just written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import duckdb

from phasewise.errors import StagingError
from phasewise.lake.postgres_catalog import (
    STAGING_TABLE,
    ask_server,
    explain_unreachable,
    find_schema,
    has_staging,
    prepare_catalog,
    tell_server,
)
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import open_server
from phasewise.lake.warehouse import WAREHOUSE_FORMAT
from phasewise.project.config import Project
from phasewise.system.files import write_atomically, write_once

#: Files of these names are replicated; locks and what a source keeps belong to one machine.
_PATTERN = "[!.]*.json"

T = TypeVar("T")

_KEYS = ("batch", "folder", "name")


@contextmanager
def explaining_writes(folder: Path) -> Iterator[None]:
    """Raise StagingError, which names the free bytes, where the system refuses a write to *folder*."""
    try:
        yield
    except OSError as exc:
        raise explain_write(folder, exc.strerror or str(exc)) from exc


def explain_write(folder: Path, text: str) -> StagingError:
    """Return the error for a write to *folder* that failed with *text*; it names the free bytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    return StagingError(
        f"Staging {folder} cannot be written ({free_bytes} bytes free): {text.rstrip('.')}.",
        hint="Free disk space or make the folder writable, then resume: what is staged is kept.",
    )


def write_shared(project: Project, path: Path, text: str) -> None:
    """Write the file *path* of staging in one step, for all machines.

    Raises:
        LakeError: the catalog does not answer.
        StagingError: the folder cannot be written.
    """
    if project.is_replicated:
        # Stored first: who fetches in between on this machine would remove a file that is not stored.
        _tell(
            project,
            f"INSERT INTO {_table(project)} VALUES ({_list_values(project, path, text)}) "
            "ON CONFLICT (batch, folder, name) DO UPDATE SET content = EXCLUDED.content",
        )
    with explaining_writes(path.parent):
        write_atomically(path, text)


def write_shared_once(project: Project, path: Path, text: str) -> None:
    """Write the file *path* of staging unless it exists; of several writers, on all machines, one wins, whole.

    Raises:
        LakeError: the catalog does not answer.
        StagingError: the folder cannot be written.
    """
    if not project.is_replicated:
        with explaining_writes(path.parent):
            write_once(path, text)
        return
    values = _list_values(project, path, text)
    _tell(project, f"INSERT INTO {_table(project)} VALUES ({values}) ON CONFLICT DO NOTHING")
    fetch_staging(project, path.relative_to(project.staging).parts[0])


def read_shared(path: Path, parse: Callable[[str], T]) -> T | None:
    """Return what *parse* makes of the file *path* of a batch's folder; None where there is none.

    Raises:
        StagingError: it is damaged.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StagingError(f"{path} is damaged.", hint=f"Remove {path.parent} and start a new batch.") from exc


def remove_shared(project: Project, path: Path) -> None:
    """Remove a file or a folder of staging, if it is there, for all machines.

    Raises:
        LakeError: the catalog does not answer.
    """
    if project.is_replicated:
        names = path.relative_to(project.staging).parts
        if len(names) == 2 and path.suffix == ".json":  # a file of the batch, not of one of its folders
            names = (names[0], "", names[1])
        where = [f"{key} = {quote_literal(name)}" for key, name in zip(_KEYS, names, strict=False)]
        _tell(project, f"DELETE FROM {_table(project)} WHERE {' AND '.join(where)}")
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def forget_batch(project: Project, batch: str) -> None:
    """Take *batch* from what is replicated; other machines remove their files of it when they next look at all batches.

    Raises:
        LakeError: the catalog does not answer.
    """
    if project.is_replicated:
        _tell(project, f"DELETE FROM {_table(project)} WHERE batch = {quote_literal(batch)}")


def fetch_staging(project: Project, batch: str | None = None, *, folder: str | None = None) -> None:
    """Make this machine's staging what is stored: of all batches, of *batch*, or of it those in *folder* and in none.

    Raises:
        LakeError: the catalog does not answer.
    """
    if not project.is_replicated:
        return
    places = [project.staging / batch] if batch else list(project.staging.glob("[!.]*"))
    # Listed before what is stored: what another process of this machine writes meanwhile is not what is gone elsewhere.
    here = [
        path for place in places for path in (*place.glob(_PATTERN), *place.glob(f"{folder or '[!.]*'}/{_PATTERN}"))
    ]
    stored = _read(project, batch, folder)
    for path, text in stored.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    for path in here:
        if path not in stored:
            path.unlink(missing_ok=True)
    for name in {_name_batch(project, path) for path in here} - {_name_batch(project, path) for path in stored}:
        shutil.rmtree(project.staging / name, ignore_errors=True)


def _name_batch(project: Project, path: Path) -> str:
    return path.relative_to(project.staging).parts[0]


def _read(project: Project, batch: str | None, folder: str | None) -> dict[Path, str]:
    assert project.catalog is not None
    where = [f"batch = {quote_literal(batch)}"] if batch else []
    where += [f"folder IN ('', {quote_literal(folder)})"] if folder else []
    query = f"SELECT batch, folder, name, content FROM {_table(project)} WHERE {' AND '.join([*where, 'true'])}"
    with open_server(project.catalog) as server:
        try:
            rows = ask_server(server, query) if has_staging(server, project.catalog) else []
        except duckdb.Error as exc:
            raise explain_unreachable(project.catalog, exc) from exc
    return {Path(project.staging, *filter(None, map(str, row[:3]))): str(row[3]) for row in rows}


def _tell(project: Project, sql: str) -> None:
    assert project.catalog is not None
    with open_server(project.catalog) as server:
        try:
            if not has_staging(server, project.catalog):
                prepare_catalog(server, project.catalog, format_number=WAREHOUSE_FORMAT)
            tell_server(server, sql)
        except duckdb.Error as exc:
            raise explain_unreachable(project.catalog, exc) from exc


def _list_values(project: Project, path: Path, text: str) -> str:
    batch, *folder, name = path.relative_to(project.staging).parts
    return ", ".join(map(quote_literal, (batch, "".join(folder), name, text)))


def _table(project: Project) -> str:
    assert project.catalog is not None
    return f"{quote_identifier(find_schema(project.catalog))}.{STAGING_TABLE}"
