"""A whole stack on one machine: the Prefect server and its workers, supervised.

A small process, the supervisor, starts the server and the workers, restarts what dies, and stops all of them when it
ends. Its folder, ``home``, holds everything that it writes:
``stack.json`` (what runs, for other commands to find), ``prefect/`` (the PREFECT_HOME of server, workers and clients,
so that the user's own is not touched) and ``logs/``.

The supervisor itself is in ``phasewise.stack.supervisor``, with how it leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phasewise.settings import Settings
from phasewise.stack.supervisor import (
    START_SECONDS,
    STOP_SECONDS,
    StackError,
    StackSpec,
    answers,
    read_state,
    state_file,
    wait_until,
)
from phasewise.system.files import write_atomically
from phasewise.system.locks import lock_file
from phasewise.system.processes import is_same_process


@dataclass(frozen=True, kw_only=True)
class StackInfo:
    """A stack that runs."""

    api_url: str
    ui_url: str
    #: Process id of the supervisor.
    pid: int
    pool: str
    #: Names of the workers.
    workers: list[str]


# ── what the commands call ───────────────────────────────────────────────────────────────────────────────────────


def find_stack(home: Path) -> StackInfo | None:
    """Return the stack of *home* when its supervisor lives and its server answers."""
    state = read_state(home)
    # Its supervisor lives, so give a server that is busy the time to answer.
    if state is None or not answers(state["api_url"], seconds=10.0):
        return None
    return StackInfo(**{key: value for key, value in state.items() if key != "started"})


def start_stack(home: Path, *, pool: str, workers: int) -> StackInfo:
    """Start a stack that stays when this command ends, or return the one that runs already.

    Returns when the server answers and every worker has reported to it. The server's port is 4200 where it is free,
    else any free one.

    Raises:
        StackError: it did not come up; the message names the log to look at.
    """
    with _starting(home):
        if found := find_stack(home):
            return found
        supervisor, info = _launch(home, pool=pool, workers=workers)
        supervisor.returncode = 0  # it is nobody's child to wait for: it stays
        return info


def stop_stack(home: Path) -> bool:
    """Stop the stack of *home* and wait until its processes are gone; False when none was running."""
    state = read_state(home)
    if state is None:
        return False
    pid = state["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not wait_until(lambda: not is_same_process(pid, state["started"]), _stop_seconds()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    state_file(home).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def running_stack(
    home: Path,
    *,
    pool: str,
    workers: int = 2,
    worker_type: str = "warm-process",
    project_env: Mapping[str, str] | None = None,
) -> Iterator[StackInfo]:
    """Use the stack of *home* if one runs, and leave it running; else start one for the time of the block.

    ``project_env`` is added to the environment of server and workers. The stack that it started ends with the block,
    and with this process, however that ends.

    Raises:
        StackError: it did not come up; the message names the log to look at.
    """
    lifeline, held = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, held)
        stack.callback(os.close, lifeline)
        with _starting(home):
            info = find_stack(home)
            if info is None:
                env = dict(project_env or {})
                supervisor, info = _launch(
                    home, pool=pool, workers=workers, worker_type=worker_type, project_env=env, lifeline=lifeline
                )
                stack.callback(_stop, supervisor)
        yield info


def start_workers(home: Path, n: int) -> StackInfo:
    """Add *n* workers to the stack of *home*; they are supervised like the others and end with it.

    Raises:
        StackError: no stack runs, or the workers did not report to the server.
    """
    with _starting(home):
        info = find_stack(home)
        if info is None:
            raise StackError("No stack is running here.", hint="Start one: make up")
        wanted = len(info.workers) + n
        write_atomically(home / "workers.wanted", str(wanted))
        os.kill(info.pid, signal.SIGUSR1)

        def have_come() -> bool:
            state = read_state(home)
            return state is None or len(state["workers"]) >= wanted

        wait_until(have_come, START_SECONDS)
        info = find_stack(home)
        if info is None or len(info.workers) < wanted:
            raise StackError(f"The {n} new workers did not come up.", hint=f"See {home / 'logs'}")
        return info


# ── starting and stopping the supervisor ─────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _starting(home: Path) -> Iterator[None]:
    """Let one command at a time start something in *home*."""
    with lock_file(home / "start.lock", timeout=math.inf):
        yield


def _launch(home: Path, *, lifeline: int | None = None, **what: Any) -> tuple[subprocess.Popen[bytes], StackInfo]:
    """Start the supervisor in a session of its own and wait for its report.

    Ctrl-C in the terminal therefore reaches the command alone, which stops the stack when it is done with it.
    """
    home = home.resolve()
    (home / "logs").mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    drain_seconds = Settings().drain_seconds
    spec = StackSpec(home=str(home), drain_seconds=drain_seconds, lifeline=lifeline, report=writer, **what)
    with (home / "logs" / "supervisor.log").open("wb") as log, os.fdopen(reader, "rb") as report:
        try:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "phasewise.stack.supervisor", json.dumps(asdict(spec))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[fd for fd in (writer, lifeline) if fd is not None],
                start_new_session=True,
                cwd=home,
            )
        finally:
            os.close(writer)
        try:
            answer = _read_report(report.fileno())
        except BaseException:
            _stop(supervisor)
            raise
    if "error" in answer:
        _stop(supervisor)
        raise StackError(answer["error"], hint=f"See the logs in {home / 'logs'}")
    return supervisor, StackInfo(**answer)


def _read_report(fd: int) -> dict[str, Any]:
    deadline = time.monotonic() + START_SECONDS
    data = b""
    while not data.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return {"error": f"The stack did not come up within {START_SECONDS:g} seconds."}
        chunk = os.read(fd, 65536)
        if not chunk:
            return {"error": "The supervisor of the stack ended before the stack was up."}
        data += chunk
    report: dict[str, Any] = json.loads(data)
    return report


def _stop_seconds() -> float:
    return STOP_SECONDS + Settings().drain_seconds


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    supervisor.terminate()
    try:
        supervisor.wait(_stop_seconds())
    except subprocess.TimeoutExpired:
        os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()
