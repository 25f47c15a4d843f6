"""What the programs share that read one table: a job comes as JSON in the first argument, the figures go to stdout.

Only the standard library: each program runs in the environment of its system. What it imports is loaded before the
clock starts, connecting to the source is within it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Job:
    #: postgresql, sqlite or duckdb.
    source: str
    #: ``postgresql://user:password@host:port/database``, or the absolute path of the file.
    address: str
    table: str
    #: Empty; whatever is written goes there.
    folder: str
    threads: int
    #: Of DuckDB, such as 256MB.
    memory_limit: str

    def url(self) -> str:
        return self.address if self.source == "postgresql" else f"{self.source}:///{self.address}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    rows: int
    seconds: float
    #: CPU seconds that this process had used when the clock started.
    startup_cpu_s: float
    peak_rss_mib: float


def run(read: Callable[[Job], int], *, prepared: Callable[[Job], AbstractContextManager[object]] | None = None) -> None:
    """Time *read*, which returns the rows that it wrote, and print the figures.

    It runs within *prepared*: what is there before a table is read, for all of them.
    """
    job = Job(**json.loads(sys.argv[1]))
    with prepared(job) if prepared else nullcontext():
        startup = _cpu_seconds()
        started = time.perf_counter()
        rows = read(job)
        seconds = time.perf_counter() - started
    print(json.dumps(asdict(Reading(rows=rows, seconds=seconds, startup_cpu_s=startup, peak_rss_mib=_peak_rss_mib()))))


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _peak_rss_mib() -> float:
    """Return the largest memory of this process, or of a child of it that has ended, whichever is more."""
    # Not ru_maxrss for the process itself: that begins with the size of whoever started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024
