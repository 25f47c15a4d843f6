"""Systems without a server: one program that stays, takes loads on its stdin and answers with times."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import environments, processes
from benchmarks.harness.load import Load, Measured
from benchmarks.systems import Context, Submit

PROGRAMS = Path(__file__).parents[1] / "programs"


class Program:
    """A program of ``benchmarks/programs``, in the environment of its system."""

    most_tables: int | None = None
    name: str

    def version(self) -> str:
        return environments.REQUIREMENTS[self.name][0]

    @contextlib.contextmanager
    def running(self, context: Context) -> Iterator[Submit]:
        env = processes.clean_environment(**self.environment(context))
        command = [self.python(context), PROGRAMS / f"{self.name}_program.py"]
        log = context.home / f"{self.name}.log"
        with processes.service(command, log=log, env=env, cwd=context.home, piped=True) as program:
            _answer(program, log)
            yield lambda load: _submit(program, load, log)

    def python(self, context: Context) -> Path:
        return environments.ensure(self.name, context.environments) / "bin" / "python"

    def environment(self, context: Context) -> dict[str, str]:
        return {}


def _submit(program: subprocess.Popen[str], load: Load, log: Path) -> Measured:
    assert program.stdin is not None
    wanted = {"tables": load.tables, "seconds": load.seconds, "short": load.short, "parallel": load.parallel}
    program.stdin.write(json.dumps(wanted) + "\n")
    program.stdin.flush()
    return Measured(**json.loads(_answer(program, log)))


def _answer(program: subprocess.Popen[str], log: Path) -> str:
    assert program.stdout is not None
    if not (line := program.stdout.readline()):
        raise processes.Broken(f"{program.args!r} ended: see {log}")
    return line


class Floor(Program):
    """What forking alone costs."""

    name = "floor"

    def version(self) -> str:
        return f"python {platform.python_version()}"

    def python(self, context: Context) -> Path:
        return Path(sys.executable)


class Luigi(Program):
    """Luigi's local scheduler with a process for each task."""

    name = "luigi"


class Dagster(Program):
    """Dagster's multiprocess executor, runs and events in its default SQLite storage."""

    name = "dagster"

    def environment(self, context: Context) -> dict[str, str]:
        (context.home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
        # The steps' forkserver imports the program by its name.
        return {"DAGSTER_HOME": str(context.home), "PYTHONPATH": str(PROGRAMS)}
