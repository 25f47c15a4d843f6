"""Write files whole or not at all, so that they survive a kill and a power cut."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Yield a draft next to *path*, which takes its place once the block ends well; else it is removed."""
    with _draft(path) as draft:
        yield draft
        sync_path(draft)
        draft.replace(path)
    sync_path(path.parent)


def write_atomically(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write *path* in one step: readers see what was there before, or all of *text*, as UTF-8."""
    with replace_whole(path) as draft:
        draft.write_text(text, encoding="utf-8", errors=errors)


def write_once(path: Path, text: str) -> None:
    """Write *path* unless it exists; of several writers at the same time one wins, whole."""
    with _draft(path) as draft, suppress(FileExistsError):
        draft.write_text(text, encoding="utf-8")
        sync_path(draft)
        os.link(draft, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    # The dot and the ending keep a draft that a kill leaves behind out of every listing; a long name may not fit.
    draft = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
