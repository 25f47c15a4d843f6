"""The warehouse of a project: create, check and attach its DuckLake, and hold its one writer's lock.

A warehouse is a folder: ``catalog.sqlite`` (DuckLake's catalog), ``data/`` (Parquet files, owned by DuckLake),
``phasewise.json`` (the format that wrote it) and ``writer.lock``. Several machines have the catalog, the format and the
lock in PostgreSQL (``phasewise.lake.postgres_catalog``), and the data on S3 (``phasewise.lake.object_store``) or in a
folder that all reach. Published tables live in the schema ``main``, marts in the schema ``marts``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb

from phasewise.errors import LakeError, WarehouseBusy, WarehouseTooNew
from phasewise.lake.object_store import create_storage_secret
from phasewise.lake.postgres_catalog import (
    SECRET,
    create_catalog_secret,
    explain_unreachable,
    find_schema,
    has_catalog,
    list_options,
    lock_catalog,
    prepare_catalog,
    read_format,
)
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import load_extension, open_server, open_session
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.system.files import write_atomically
from phasewise.system.locks import LockHeld, lock_file

#: Layout of the warehouse's folder; a higher number in phasewise.json was written by a newer Phasewise.
WAREHOUSE_FORMAT = 1

_CATALOG = "catalog.sqlite"
_MARKER = "phasewise.json"
_LOCK = "writer.lock"
_PROBE = "phasewise.csv"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One state of the whole warehouse."""

    id: int
    at: datetime
    #: The batch that was published as this snapshot; None for maintenance and the empty first one.
    batch: str | None


def list_extensions(project: Project) -> tuple[str, ...]:
    """Return the extensions that a session of the project's warehouse needs."""
    catalog = "postgres_scanner" if project.catalog else "sqlite_scanner"
    return ("ducklake", catalog, "httpfs") if project.is_stored else ("ducklake", catalog)


def has_lake(project: Project) -> bool:
    """Tell whether the project's warehouse has been created.

    Raises:
        LakeError: its catalog in PostgreSQL does not answer.
    """
    if project.catalog is None:
        catalog = project.warehouse / _CATALOG
        return catalog.is_file() and _has_tables(catalog)
    return _find_format(project) is not None


def _has_tables(catalog: Path) -> bool:
    # The first publisher may have been killed between making the file and DuckLake's tables in it.
    try:
        with closing(sqlite3.connect(f"{catalog.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            tables = connection.execute("select count(*) from sqlite_schema where name = 'ducklake_metadata'")
            return bool(tables.fetchone()[0])
    except sqlite3.Error:  # locked or damaged: whoever attaches it says so
        return True


def reach_warehouse(connection: duckdb.DuckDBPyConnection, project: Project) -> None:
    """Let *connection* read and write the catalog and the files of the project's warehouse, wherever they are."""
    for name in list_extensions(project):
        load_extension(connection, name)  # a millisecond where it is loaded
    if project.catalog is not None:
        create_catalog_secret(connection, project.catalog)
    if project.is_stored:
        create_storage_secret(connection)


def attach_lake(
    connection: duckdb.DuckDBPyConnection,
    project: Project,
    *,
    read_only: bool = False,
    snapshot: int | None = None,
    name: str = "lake",
) -> None:
    """Attach the project's warehouse as *name*, creating it when it is missing (unless *read_only*).

    With *snapshot* the warehouse is seen as it was then, read-only.

    Raises:
        WarehouseTooNew: a newer version wrote it.
        LakeError: it is missing (*read_only*), damaged or cannot be written.
    """
    is_reader = read_only or snapshot is not None
    found = _find_format(project)
    if found is not None:
        _check_format(project, found)
    elif is_reader:
        raise LakeError(
            f"There is no warehouse in {project.warehouse_name}.", hint="Publish a batch first: make run-distributed"
        )
    else:
        _prepare_warehouse(project)
    reach_warehouse(connection, project)
    options = [f"DATA_PATH {quote_literal(project.data_path)}", "OVERRIDE_DATA_PATH true"]
    options += ["READ_ONLY"] if is_reader else []
    options += [f"SNAPSHOT_VERSION {snapshot:d}"] if snapshot is not None else []
    if project.catalog is None:
        catalog = f"ducklake:sqlite:{project.warehouse / _CATALOG}"
        options += ["META_JOURNAL_MODE 'WAL'"]
        # Else the scanner reads the catalog through several connections, each of which sees what was committed last:
        # a reader next to a writer finds tables without rows. Of the session alone it would not reach DuckLake's own
        # connection. Only here, since it would slow down sources in SQLite. See decision 71.
        connection.execute("SET GLOBAL sqlite_disable_multithreaded_scans = true")
    else:
        catalog = f"ducklake:postgres:{list_options(project.catalog, is_writer=not is_reader)}"
        options += [f"META_SCHEMA {quote_literal(find_schema(project.catalog))}", f"META_SECRET '{SECRET}'"]
    try:
        connection.execute(f"ATTACH {quote_literal(catalog)} AS {quote_identifier(name)} ({', '.join(options)})")
    except duckdb.Error as exc:
        raise _explain_attach(project, exc) from exc


def prepare_lake(project: Project, settings: Settings) -> None:
    """Make sure that the warehouse can be written by this version and, in a folder, has ``min_free_bytes`` free.

    Raises:
        WarehouseTooNew: a newer version wrote it.
        LakeError: its catalog or its files cannot be written, or too little is free.
    """
    _prepare_warehouse(project)
    _check_format(project, _find_format(project) or WAREHOUSE_FORMAT)
    if project.is_stored:
        _try_storage(project, settings)
        return
    data = Path(project.data_path)
    for folder in [data] if project.catalog else [project.warehouse, data]:
        if not os.access(folder, os.W_OK):
            raise LakeError(f"The warehouse {folder} cannot be written.", hint="Check the folder's permissions.")
    free_bytes = shutil.disk_usage(data).free
    if free_bytes < settings.min_free_bytes:
        raise LakeError(
            f"The warehouse {data} has {free_bytes} bytes free, a batch needs {settings.min_free_bytes}.",
            hint="Free disk space, or lower PHASEWISE_MIN_FREE_BYTES.",
        )


def list_snapshots(connection: duckdb.DuckDBPyConnection) -> list[Snapshot]:
    """Return the snapshots that the attached lake still has, oldest first."""
    rows = connection.execute(
        "SELECT snapshot_id, snapshot_time, commit_extra_info FROM lake.snapshots() ORDER BY snapshot_id"
    ).fetchall()
    return [Snapshot(id=row[0], at=row[1], batch=_find_batch(row[2])) for row in rows]


@contextmanager
def lock_lake(project: Project, *, timeout: float) -> Iterator[None]:
    """Be the one writer of the warehouse.

    Overlapping transactions that write to a SQLite catalog fail at commit, so writers queue here. The lock ends
    with the process that holds it, however that ends.

    Raises:
        WarehouseBusy: another process still held the lock after *timeout* seconds; it names that process.
        LakeError: the catalog in PostgreSQL does not answer.
    """
    if project.catalog is None:
        with _lock_folder(project, timeout):
            yield
    else:
        with open_server(project.catalog) as server, lock_catalog(server, project.catalog, timeout=timeout):
            yield


@contextmanager
def _lock_folder(project: Project, timeout: float) -> Iterator[None]:
    _prepare_warehouse(project)
    with ExitStack() as held:
        own = f"Process {os.getpid()} on {socket.gethostname()}"
        try:
            held.enter_context(lock_file(project.warehouse / _LOCK, holder=own, timeout=timeout))
        except LockHeld as exc:
            raise WarehouseBusy(
                f"{exc.holder or 'Another process'} is writing to the warehouse {project.warehouse}.",
                hint=f"Waited {timeout:g} s. Retry once it is done.",
            ) from exc
        except OSError as exc:
            raise LakeError(f"The warehouse {project.warehouse} cannot be locked: {exc.strerror}.") from exc
        yield


def _prepare_warehouse(project: Project) -> None:
    """Create what of the warehouse is missing: its folders, or the schema of its catalog."""
    if not project.is_stored:
        with _explaining_writes(Path(project.data_path)) as folder:
            folder.mkdir(parents=True, exist_ok=True)
    if project.catalog is not None:
        with open_server(project.catalog) as server:
            prepare_catalog(server, project.catalog, format_number=WAREHOUSE_FORMAT)
    else:
        with _explaining_writes(project.warehouse) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / _MARKER).exists():
                write_atomically(folder / _MARKER, json.dumps({"format": WAREHOUSE_FORMAT}))


@contextmanager
def _explaining_writes(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    except OSError as exc:
        raise LakeError(
            f"The warehouse {folder} cannot be written: {exc.strerror}.",
            hint="Check the folder's permissions and free space, or change [warehouse] path.",
        ) from exc


def _try_storage(project: Project, settings: Settings) -> None:
    """Write a small object next to the files of the warehouse, always the same."""
    with open_session(settings, extensions=("httpfs",)) as connection:
        create_storage_secret(connection)
        try:
            connection.execute(
                f"COPY (SELECT {WAREHOUSE_FORMAT} AS format) TO {quote_literal(project.data_path + _PROBE)}"
            )
        except duckdb.Error as exc:
            raise LakeError(
                f"The warehouse {project.data_path} cannot be written: {str(exc).splitlines()[0].rstrip('.')}.",
                hint="Check the bucket of [warehouse] data, and the variables AWS_* where the command and workers run.",
            ) from exc


def _find_format(project: Project) -> int | None:
    """Return the format of the project's warehouse; None where there is no warehouse yet."""
    if project.catalog is None:
        return _read_marker(project.warehouse) if has_lake(project) else None
    with open_server(project.catalog) as server:
        if not has_catalog(server, project.catalog):
            return None
        return read_format(server, project.catalog) or WAREHOUSE_FORMAT  # None: a plain DuckLake, as below


def _check_format(project: Project, written: int) -> None:
    if written > WAREHOUSE_FORMAT:
        raise WarehouseTooNew(
            f"The warehouse {project.warehouse_name} has format {written}; this version knows {WAREHOUSE_FORMAT}.",
            hint="Upgrade phasewise. Nothing was changed.",
        )


def _read_marker(warehouse: Path) -> int:
    try:
        return int(json.loads((warehouse / _MARKER).read_text(encoding="utf-8"))["format"])
    except FileNotFoundError:
        return WAREHOUSE_FORMAT  # a plain DuckLake; DuckLake itself checks its version
    except (ValueError, KeyError, TypeError) as exc:
        raise LakeError(f"{warehouse / _MARKER} is damaged.", hint="Remove it if the warehouse is yours.") from exc


def _explain_attach(project: Project, exc: duckdb.Error) -> LakeError:
    # The version is read from DuckLake's message, not from the catalog: a second SQLite library in this process
    # that opens and closes the file takes away the POSIX locks that the scanner holds on it.
    match = re.search(r"catalog version is ([\w.-]+), but the extension requires version ([\w.-]+)", str(exc))
    warehouse = project.warehouse_name
    if match is None and project.catalog is not None:
        return explain_unreachable(project.catalog, exc)
    if match is None:
        return LakeError(
            f"The warehouse {warehouse} cannot be opened: {exc}.",
            hint="Check that the folder is writable and that its catalog.sqlite is intact.",
        )
    found, supported = match.groups()
    if _parse_version(found) > _parse_version(supported):
        return WarehouseTooNew(
            f"The warehouse {warehouse} has DuckLake format {found}; this version knows {supported}.",
            hint="Upgrade phasewise. Nothing was changed.",
        )
    return LakeError(
        f"The warehouse {warehouse} has the old DuckLake format {found}; this version needs {supported}.",
        hint="Migrate it once with DuckDB: ATTACH 'ducklake:…' (AUTOMATIC_MIGRATION true).",
    )


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _find_batch(extra_info: str | None) -> str | None:
    try:
        info = json.loads(extra_info or "null")
    except ValueError:
        return None
    return info.get("batch") if isinstance(info, dict) else None
