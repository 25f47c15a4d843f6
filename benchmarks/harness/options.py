"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def choices(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a reader of lists such as ``a,b``, whose parts are some of *names*."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
        return chosen

    return read


@contextlib.contextmanager
def open_folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder for data and logs: *keep*, or a temporary one."""
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phasewise-benchmark-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # PostgreSQL runs as another user when we are root
        yield folder.resolve()
