"""Systems that read one table of a source into Parquet: one program each, in a process of its own for each run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from benchmarks.harness import environments, meter, processes
from benchmarks.programs.reading import Job, Reading
from benchmarks.systems import Unavailable

_PROGRAMS = Path(__file__).parents[1] / "programs"
#: The server's own tail (a backend that ends, what it writes) belongs to the run.
_SETTLE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Reader:
    program: str
    arguments: tuple[str, ...] = ()
    sources: tuple[str, ...]
    #: Of ``environments.REQUIREMENTS``; None: the project's own.
    environment: str | None = None
    #: Of the project's own environment, whose version is reported; None: that of the peer, or of psql.
    distribution: str | None = None

    def version(self) -> str:
        if self.environment is not None:
            return environments.REQUIREMENTS[self.environment][0]
        return metadata.version(self.distribution) if self.distribution else _psql("--version").split()[2]

    def read(self, job: Job, *, peers: Path, log: Path) -> tuple[Reading, float]:
        """Read the table of *job*; return the figures, and the CPU seconds of the program and of the source's server.

        Raises:
            Broken: the program failed.
        """
        command = [self._python(peers), _PROGRAMS / self.program, json.dumps(asdict(job)), *self.arguments]
        before = meter.tree_cpu_seconds()
        with processes.service(
            command, log=log, env=processes.clean_environment(), cwd=Path(job.folder), piped=True
        ) as program:
            reading = Reading(**_read_answer(program, log))
        time.sleep(_SETTLE_SECONDS)
        return reading, meter.tree_cpu_seconds() - before - reading.startup_cpu_s

    def _python(self, peers: Path) -> Path:
        if self.environment is None:
            return Path(sys.executable)
        return environments.ensure(self.environment, peers) / "bin" / "python"


def load_readers() -> Mapping[str, Reader]:
    """Return all readers by name, in the order of the documentation."""
    every = ("postgresql", "sqlite", "duckdb")
    adbc, connectorx, dlt = (
        partial(Reader, program=f"read_{name}.py", environment=name, sources=("postgresql", "sqlite"))
        for name in ("adbc", "connectorx", "dlt")
    )
    return {
        "phasewise": Reader(program="read_phasewise.py", sources=every, distribution="phasewise"),
        "duckdb": Reader(program="read_duckdb.py", sources=every, distribution="duckdb"),
        "duckdb-typed": Reader(program="read_duckdb.py", arguments=("typed",), sources=every, distribution="duckdb"),
        "psql": Reader(program="read_psql.py", sources=("postgresql",)),
        "adbc": adbc(),
        "connectorx": connectorx(),
        "dlt-pyarrow": dlt(arguments=("pyarrow",)),
        "dlt-connectorx": dlt(arguments=("connectorx",)),
    }


def _read_answer(program: subprocess.Popen[str], log: Path) -> dict[str, float]:
    assert program.stdout is not None
    lines = program.stdout.read().splitlines()
    if program.wait() or not lines:
        raise processes.Broken(f"it failed: see {log}")
    answer: dict[str, float] = json.loads(lines[-1])
    return answer


def _psql(argument: str) -> str:
    if shutil.which("psql") is None:
        raise Unavailable("psql is not installed")
    return subprocess.run(["psql", argument], check=True, capture_output=True, text=True).stdout
