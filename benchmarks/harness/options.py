"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


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


def run(
    measure: Callable[[Path], Iterator[R]],
    options: argparse.Namespace,
    *,
    describe: Callable[[R], str],
    summarise: Callable[[Sequence[R]], str],
) -> int:
    """Print each record that *measure* yields and write all of them to ``--json``; return the exit status."""
    # Both end the benchmark by unwinding, which stops what was started. Ctrl-C too is set here: a shell that starts
    # a command in the background lets it ignore the signal.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    records: list[R] = []
    with open_folder(options.keep) as folder:
        try:
            for record in measure(folder):
                records.append(record)
                print(describe(record), flush=True)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        finally:
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    print(f"\n{summarise(records)}")
    return 0 if records else 1
