"""Digests: what tells the bytes of a staged file from any others.

A manifest has that of each of its files, taken when they were just written; publishing takes it again. On a disk it is
size and CRC-32: it finds every change within 32 bits, so each byte that flips, and is the fastest that Python has (3.6
GB/s, SHA-256 1.5, BLAKE2 0.8). On S3 it is size and ETag, which the storage makes of the bytes that it was given:
nothing is downloaded for it.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import duckdb

from phasewise.lake.object_store import File, StoredFile, read_etag

#: Fits the cache of a processor.
_BLOCK = 256 * 1024


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
