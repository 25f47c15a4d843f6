"""What was extracted of a table: its manifest and its files.

Each table, or each part of one that is split, has a folder that is written by one process at a time (its lock), and
read only once its manifest is there, so that nothing half-written is ever taken for complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
from pydantic import TypeAdapter

from phasewise.errors import StagingError
from phasewise.lake.object_store import File, StoredFile, is_stored, read_etag
from phasewise.project.config import Project
from phasewise.sources import Column
from phasewise.staging.load_plan import Load
from phasewise.staging.partitions import name_item, read_splits
from phasewise.staging.replication import fetch_staging

MANIFEST = "manifest.json"
# A digest of a file on a disk is size and CRC-32: it finds every change within 32 bits, so each byte that flips, and is
# the fastest that Python has (3.6 GB/s, SHA-256 1.5, BLAKE2 0.8). On S3 it is size and ETag, which the storage makes
# of the bytes that it was given: nothing is downloaded for it.
#: Bytes of a file that are read at once: they fit the cache of a processor.
_BLOCK = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was extracted of one table."""

    batch: str
    table: str
    #: Which part of the table it is of; None: of the whole.
    partition: str | None = None
    #: Rows of the whole table, as the source counted them when it was split.
    table_rows: int | None = None
    rows: int
    #: Of the files on disk, compressed.
    size_bytes: int
    #: What the source itself counted at the moment of the scan.
    source_rows: int
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    #: Names relative to the manifest's folder, or URLs on S3.
    files: tuple[str, ...]
    started_at: datetime
    ended_at: datetime
    #: URL of the source, without its password.
    source: str
    #: The moment of the source, where it was held for several tables: those with the same are consistent with one
    #: another. None: the table is consistent for itself alone.
    snapshot: str | None = None
    #: Why the table is consistent for itself alone, where the source or the setting has a reason.
    snapshot_note: str | None = None
    #: Why the table was staged whole, where it may have more rows than its limit and could not be split.
    split_note: str | None = None
    #: Which rows were read, and what the publishing does with them.
    load: Load = field(default_factory=Load)
    #: Files with all keys of the source, where deleted rows are found by them.
    key_files: tuple[str, ...] = ()
    #: What tells the bytes of each of ``files``, then of each of ``key_files``, from any others, as they were written;
    #: publishing takes it again.
    digests: tuple[str, ...] = ()
    #: Of the layout; a manifest of another one is extracted again.
    version: Literal[2] = 2

    @property
    def seconds(self) -> float:
        return (self.ended_at - self.started_at).total_seconds()

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=datetime.isoformat, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises: ValueError when *text* is no manifest of this version."""
        manifest = _ADAPTER.validate_json(text)
        if len(manifest.digests) != len(manifest.files) + len(manifest.key_files):
            raise ValueError("a digest is missing")
        return manifest


_ADAPTER = TypeAdapter(Manifest)


def list_manifests(project: Project, batch: str) -> list[Manifest]:
    """Return the manifests of the tables that are staged completely, with all of their parts, in name order."""
    fetch_staging(project, batch)
    return list_staged_manifests(project, batch)


def list_staged_manifests(project: Project, batch: str) -> list[Manifest]:
    folder = batch_folder(project, batch)
    found = read_manifests(folder)
    staged = {(manifest.table, manifest.partition): manifest for manifest in found}
    splits = read_splits(folder)
    complete: list[Manifest] = []
    for table in sorted({manifest.table for manifest in found}):
        wanted = splits[table].list_names() if table in splits else [None]
        if all((table, name) in staged for name in wanted):
            complete += [staged[table, name] for name in wanted]
    return complete


def list_files(project: Project, batch: str) -> set[Path | StoredFile]:
    """Return the Parquet files of all that is staged of *batch*, also of tables of which some parts are missing."""
    fetch_staging(project, batch)
    return {
        file
        for manifest in read_manifests(batch_folder(project, batch))
        for file in (*staged_files(project, manifest), *staged_key_files(project, manifest))
    }


def read_manifests(folder: Path) -> list[Manifest]:
    if not folder.is_dir():
        return []
    return [manifest for entry in folder.iterdir() if (manifest := read_complete(entry)) is not None]


def staged_files(project: Project, manifest: Manifest) -> list[Path | StoredFile]:
    """Return the Parquet files of a staged table, or of a part of it."""
    return _locate(project, manifest, manifest.files)


def staged_key_files(project: Project, manifest: Manifest) -> list[Path | StoredFile]:
    """Return the Parquet files with the keys of the source; none where deleted rows need none."""
    return _locate(project, manifest, manifest.key_files)


def _locate(project: Project, manifest: Manifest, names: tuple[str, ...]) -> list[Path | StoredFile]:
    folder = (project.staging / name_manifest(manifest)).parent
    return [StoredFile(name) if is_stored(name) else folder / name for name in names]


def name_in_manifest(file: Path | StoredFile) -> str:
    return file.name if isinstance(file, Path) else file.url


def name_manifest(manifest: Manifest) -> str:
    """Return the path of a manifest's file below the staging folder, which may have another name on each machine."""
    return f"{manifest.batch}/{folder_name(name_item(manifest.table, manifest.partition))}/{MANIFEST}"


def summarize(manifest: Manifest) -> dict[str, Any]:
    """Return what the flow run that staged it reports: numbers and short texts."""
    return {
        "table": manifest.table,
        **({"partition": manifest.partition} if manifest.partition else {}),
        "rows": manifest.rows,
        "size_bytes": manifest.size_bytes,
        "seconds": round(manifest.seconds, 3),
        "manifest": name_manifest(manifest),
    }


def batch_folder(project: Project, batch: str) -> Path:
    """Return the folder of *batch*, which need not exist.

    Raises:
        StagingError: *batch* cannot be the name of a folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", batch):
        raise StagingError(f'"{batch}" cannot be the id of a batch.', hint="Use letters, digits, - _ and dots.")
    return project.staging / batch


def folder_name(table: str) -> str:
    """Return a folder name that is safe on every file system, different for different tables.

    A name of lower-case letters, digits and underscores is its own. Any other gets a digest, which also keeps
    apart what differs by case only, where file systems do not. The manifest holds the real name.
    """
    if re.fullmatch(r"[a-z0-9_]{1,80}", table):
        return table
    readable = re.sub(r"[^a-z0-9_]+", "-", table.lower())[:40].strip("-")
    return f"{readable}-{hashlib.sha256(table.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def read_complete(folder: Path) -> Manifest | None:
    """Return the manifest in *folder* when all that it names is there in full; else None."""
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if any(is_stored(name) for name in manifest.files):
            return manifest  # they were there in full before it; publishing looks again
        size_bytes = sum((folder / name).stat().st_size for name in manifest.files)
        for name in manifest.key_files:
            (folder / name).stat()
    except (OSError, ValueError):
        return None
    return manifest if size_bytes == manifest.size_bytes else None


def digest_file(connection: duckdb.DuckDBPyConnection, file: File) -> str | None:
    """Return the digest of a staged file, such as ``1024-crc32-0a1b2c3d``; None when it is not there."""
    if isinstance(file, StoredFile):
        return read_etag(connection, file)
    try:
        return digest_path(file)
    except FileNotFoundError:
        return None


def digest_path(path: Path) -> str:
    """Return the digest of a file on a disk. Safe in a thread.

    Raises:
        OSError: it cannot be read.
    """
    checksum, size_bytes, block = 0, 0, bytearray(_BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(view[:count], checksum)
            size_bytes += count
    return f"{size_bytes}-crc32-{checksum:08x}"
