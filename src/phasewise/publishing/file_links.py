"""Give staged files to the lake without copying them.

They are linked because DuckLake owns what it registers, and deletes it once no snapshot needs it. On S3, which has no
links, they were written into the lake's folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import duckdb

from phasewise.errors import LakeError, StagingError
from phasewise.lake.object_store import FILE_PREFIX
from phasewise.lake.object_store import File as File
from phasewise.lake.publications import Publication as Publication
from phasewise.lake.publications import PublishedTable as PublishedTable
from phasewise.project.config import Project
from phasewise.staging.batch import advise_again
from phasewise.staging.manifest import Manifest, measure_file, staged_files
from phasewise.system.files import sync_path

#: ``link`` fails with these where the lake lies on another file system, or on one that has no links.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def link_files(
    connection: duckdb.DuckDBPyConnection, project: Project, staged: Mapping[str, Sequence[Manifest]]
) -> dict[str, list[File]]:
    """Return, per table, its staged files as links in the lake's data folder; those on S3 as they are.

    When publishing fails they stay there, and the next cleanup removes them: to remove them here could hit a commit
    that had succeeded after all, when a signal arrives just behind it.

    Raises:
        StagingError: a staged file is missing or has another size.
        LakeError: the lake's folder cannot be written.
    """
    data = Path(project.data_path, "main")
    linked: dict[str, list[File]] = {}
    try:
        for table, parts in staged.items():
            files = [file for part in parts for file in _check_files(connection, project, part)]
            linked[table] = [
                link_file(file, data / _folder_name(table)) if isinstance(file, Path) else file for file in files
            ]
        sync_folders({file.parent for files in linked.values() for file in files if isinstance(file, Path)})
    except OSError as exc:
        raise explain_link_error(project, exc) from exc
    return linked


def explain_link_error(project: Project, exc: OSError) -> LakeError:
    return LakeError(
        f"The warehouse {project.warehouse_name} cannot be written: {exc.strerror or exc}. It is unchanged.",
        hint="Free some space, or make the folder writable, then try again.",
    )


def _check_files(connection: duckdb.DuckDBPyConnection, project: Project, manifest: Manifest) -> list[File]:
    files = staged_files(project, manifest)
    sizes = [measure_file(connection, file) for file in files]
    size_bytes = sum(size for size in sizes if size is not None)
    if None in sizes or size_bytes != manifest.size_bytes:
        raise StagingError(
            f'The staged files of table "{manifest.table}" are not those of its manifest '
            f"({size_bytes} bytes, not {manifest.size_bytes}).",
            hint=advise_again(files[0]),
        )
    return files


def _folder_name(table: str) -> str:
    """Return a folder for *table* that any file system takes; two tables may share one, their files never clash."""
    return re.sub(r"[^a-z0-9_]+", "-", table.lower())[:60].strip("-") or "table"


def link_file(file: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{FILE_PREFIX}{uuid.uuid4().hex}.parquet"
    try:
        os.link(file, target)
    except OSError as exc:
        if exc.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(file, target)
        sync_path(target)
    return target


def sync_folders(folders: Iterable[Path]) -> None:
    """Make the links durable: the commit that names them must not survive a power cut that they do not."""
    for folder in folders:
        sync_path(folder)
