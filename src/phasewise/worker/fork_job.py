"""What a flow run is forked with, and which runs can be forked. Runs in the worker's process.

A fork must serve a run exactly as a new process would.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect.client.schemas.responses import DeploymentResponse

#: How the UI names and describes the type of work pool.
WARM_NAME = "Warm process"
WARM_DESCRIPTION = (
    "Execute flow runs as subprocesses forked from a warm one, so that they start in milliseconds. "
    "Works wherever the Process type works."
)
#: What the process of a flow run tells its worker: that its flow has no hooks for a cancellation or a crash, and that
#: it has begun.
NO_HOOKS = "no hooks"
BEGUN = "begun"
_SET_WORKING_DIRECTORY = "prefect.deployments.steps.set_working_directory"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a flow run and its hooks are forked with."""

    entrypoint: str
    cwd: str
    env: dict[str, str]
    stdio: tuple[int, int]
    #: What the run would read from the server although its worker has read it already.
    known: dict[str, Any]

    @property
    def where(self) -> dict[str, Any]:
        """What ``Forkserver.fork`` is told of it."""
        stdout, stderr = self.stdio
        return {"env": self.env, "cwd": self.cwd, "stdout": stdout, "stderr": stderr}


def why_not_workspace(deployment: DeploymentResponse) -> str | None:
    """Say why the code of *deployment* has to be fetched before it can run; None when it is there."""
    steps = deployment.pull_steps or []
    if not steps:
        if ":" in (deployment.entrypoint or "") or deployment.path or deployment.storage_document_id:
            return "its code is copied from storage."
        return None
    if pulled_directory(deployment) is None:
        return "its pull steps do more than name an existing folder."
    return None


def pulled_directory(deployment: DeploymentResponse) -> Path | None:
    """Return the folder of a deployment whose only pull step is ``set_working_directory``."""
    match deployment.pull_steps:
        case [{**step}] if list(step) == [_SET_WORKING_DIRECTORY]:
            directory = (step[_SET_WORKING_DIRECTORY] or {}).get("directory")
            if isinstance(directory, str) and Path(directory).is_absolute() and Path(directory).is_dir():
                return Path(directory).resolve()
    return None


@contextmanager
def working_directory(configured: Path | None) -> Iterator[str]:
    """Give a run the folder that its job names, or one of its own for as long as it runs."""
    if configured:
        yield str(configured.resolve())
    else:
        with TemporaryDirectory(suffix="prefect") as folder:
            yield str(Path(folder).resolve())


def has_prefect_settings(folder: Path) -> bool:
    """Tell whether a Python started in *folder* would read Prefect settings from its files."""
    if (folder / "prefect.toml").exists():
        return True
    with suppress(OSError):
        if "PREFECT_" in (folder / ".env").read_text(errors="replace"):
            return True
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text())
    except (OSError, ValueError):
        return False
    return "prefect" in project.get("tool", {})


def differing_variables(warm: Mapping[str, str], wanted: Mapping[str, str | None]) -> list[str]:
    """Name the variables that are read once, when Python or Prefect starts, and differ."""
    fixed = {key for key in (*warm, *wanted) if _is_fixed_at_start(key)}
    return sorted(key for key in fixed if warm.get(key) != wanted.get(key))


def _is_fixed_at_start(name: str) -> bool:
    if name.startswith("PREFECT__"):
        return False  # not settings: they name the run, and are read when it starts
    # Beside what chooses code: what the C library reads once, the locale (and so the encoding of files) among it.
    return name.startswith(("PREFECT_", "PYTHON", "LD_", "LC_", "MALLOC_")) or name in ("LANG", "GLIBC_TUNABLES")


def version_of(deployment: DeploymentResponse) -> str:
    """Return what changes when another version of the code is deployed, and not when a worker polls."""
    parts = (deployment.version_id, deployment.version, deployment.entrypoint, deployment.pull_steps, deployment.path)
    return os.linesep.join(str(part) for part in parts)
