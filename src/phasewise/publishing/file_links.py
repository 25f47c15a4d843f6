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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phasewise.errors import LakeError, PublishConflict
from phasewise.lake.object_store import FILE_PREFIX, File
from phasewise.project.config import Project
from phasewise.publishing.audit_batch import AuditedBatch
from phasewise.publishing.increments import TableFiles
from phasewise.publishing.session import WarehouseSession
from phasewise.staging.manifest import Manifest, digest_file, digest_path, staged_files, staged_key_files
from phasewise.system.files import sync_path

#: Files that are read at the same time to see that they are what was audited: Python waits for none of them.
_READERS = 4

#: ``link`` fails with these where the lake lies on another file system, or on one that has no links.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, kw_only=True)
class _Link:
    part: Manifest
    staged: File
    #: What is published: on a disk another name of the same file.
    file: File
    digest: str
    is_key: bool


@contextmanager
def linked_files(session: WarehouseSession, audited: AuditedBatch) -> Iterator[dict[str, TableFiles]]:
    """Yield, per table, its staged files as links in the lake's data folder; those on S3 as they are.

    The links are what is compared with the audited digests and what is published: nobody can put another file in place
    between. When publishing fails they stay there, and the next cleanup removes them: to remove them here could hit a
    commit that had succeeded after all, when a signal arrives just behind it.

    Raises:
        PublishConflict: a staged file is missing, or has other bytes than when it was extracted and audited.
        LakeError: the lake's folder cannot be written.
    """
    links: list[_Link] = []
    try:
        for parts in audited.batch.by_table.values():
            links += [link for part in parts for link in _link_part(session.project, part)]
        _refuse_other_bytes(session, links)
        sync_folders({link.file.parent for link in links if isinstance(link.file, Path)})
    except OSError as exc:
        raise explain_link_error(session.project, exc) from exc
    except PublishConflict:
        _unlink(links)  # none of them is registered yet
        raise
    try:
        yield {table: _list_files(links, table) for table in audited.batch.tables}
    finally:
        _unlink(link for link in links if link.is_key)  # they are read, and never registered


def _link_part(project: Project, part: Manifest) -> Iterator[_Link]:
    folder = Path(project.data_path, "main", _name_folder(part.table))
    rows, keys = staged_files(project, part), staged_key_files(project, part)
    for number, (file, digest) in enumerate(zip([*rows, *keys], part.digests, strict=True)):
        try:
            link = link_file(file, folder) if isinstance(file, Path) else file
        except FileNotFoundError:
            if isinstance(file, Path) and file.exists():
                raise  # then it is the folder of the lake that is gone
            raise _refuse(part, file, "is missing") from None
        yield _Link(part=part, staged=file, file=link, digest=digest, is_key=number >= len(rows))


def _refuse_other_bytes(session: WarehouseSession, links: Sequence[_Link]) -> None:
    with ThreadPoolExecutor(_READERS) as threads:
        on_disk = {link.file: threads.submit(digest_path, link.file) for link in links if isinstance(link.file, Path)}
        for link in links:
            # DuckDB's connection is for one thread.
            found = on_disk[link.file].result() if link.file in on_disk else digest_file(session.connection, link.file)
            if found != link.digest:
                raise _refuse(link.part, link.staged, "has changed" if found else "is missing")


def _refuse(part: Manifest, file: File, problem: str) -> PublishConflict:
    return PublishConflict(
        f'The staged files of table "{part.table}" are not those that were audited: {file.name} {problem}. '
        "Nothing was published.",
        hint="Start a new batch.",
    )


def _list_files(links: Sequence[_Link], table: str) -> TableFiles:
    own = [link for link in links if link.part.table == table]
    return TableFiles(
        rows=tuple(link.file for link in own if not link.is_key), keys=tuple(link.file for link in own if link.is_key)
    )


def _unlink(links: Iterable[_Link]) -> None:
    for link in links:
        if isinstance(link.file, Path):
            link.file.unlink(missing_ok=True)


def explain_link_error(project: Project, exc: OSError) -> LakeError:
    return LakeError(
        f"The warehouse {project.warehouse_name} cannot be written: {exc.strerror or exc}. It is unchanged.",
        hint="Free some space, or make the folder writable, then try again.",
    )


def _name_folder(table: str) -> str:
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
