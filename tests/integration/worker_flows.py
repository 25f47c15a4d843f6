"""Flows that the tests of the worker run."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task


@flow
def completed(value: int = 1) -> int:
    get_run_logger().info("the value is %s", value)
    return value


@flow
def failed() -> None:
    raise ValueError("boom")


@flow
def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@flow
def leaves_with_a_code() -> None:
    os._exit(3)


@flow
def takes_memory(size_bytes: int) -> None:
    bytearray(size_bytes)


@flow
def a_moment() -> None:
    time.sleep(0.3)


@task
def double(value: int) -> int:
    return 2 * value


@flow
def with_tasks() -> list[int]:
    print("said on stdout", flush=True)
    print("said on stderr", file=sys.stderr, flush=True)
    return [double(value) for value in range(3)]


@flow
def asleep() -> None:
    time.sleep(120)


@flow
def short() -> None:
    time.sleep(2)


@flow
def held(file: str) -> None:
    while not Path(file).exists():
        time.sleep(0.05)


@flow
async def asleep_async() -> None:
    await asyncio.sleep(120)


@flow
def with_a_child_process(pid_file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    Path(pid_file).write_text(str(child.pid))
    child.wait()


@flow
def ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(120)


@flow
def surroundings(file: str) -> None:
    found = {
        "cwd": str(Path.cwd()),
        "colour": os.environ.get("COLOUR"),
        "parent": os.getppid(),
        "path": sys.path[0],
        "python": sys.prefix,
    }
    Path(file).write_text(repr(found))


def note(flow: Any, flow_run: Any, state: Any) -> None:
    with Path(flow_run.parameters["file"]).open("a") as file:
        file.write(f"{state.name}\n")


@flow(on_cancellation=[note], on_crashed=[note])
def with_hooks(file: str, die: bool) -> None:
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


@flow
def with_tasks_for_a_while() -> None:
    for value in range(600):
        double(value)
        time.sleep(0.2)


def record_imports(file: str, **arguments: Any) -> int:
    """Forked in place of ``run_flow_run``: writes what the run imports after the fork to *file*."""
    from phasewise.worker.child import run_flow_run

    at_the_fork = set(sys.modules)
    # At exit, because flushing logs and events is part of what a run does.
    atexit.register(lambda: Path(file).write_text("\n".join(sorted(set(sys.modules) - at_the_fork))))
    return run_flow_run(**arguments)
