"""One flow run of a local batch. Runs in the process that is forked for it; ``load_flows`` in the forkserver before."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phasewise.local.engine import (
    FLOWS,
    OUTCOMES,
    Ending,
    NoFlowRuns,
    call_flow,
    describe_failure,
    entering_flow_run,
    install,
    load_flow,
    stop_retrying,
)
from phasewise.orchestration.flow_runs import LocalRun
from phasewise.outcomes import StepOutcome


def load_flows() -> None:
    """Load the flows that the environment names, before the first fork."""
    for entrypoint, root in json.loads(os.environ[FLOWS]):
        with suppress(Exception):  # a run that needs it says what is wrong with it
            load_flow(entrypoint, Path(root) if root else None)


class _Stopped(BaseException):
    """The process was asked to end. Not an Exception: only clean-up code should see it."""


def run_flow_run(
    entrypoint: str, root: str | None, parameters: dict[str, Any], run_id: str, name: str, descriptor: int
) -> int:
    """Run one flow run and say on the socket *descriptor* how it ended; the target of a fork."""
    signal.signal(signal.SIGTERM, _stop)
    install()
    with socket.socket(fileno=descriptor) as channel:
        parent = _Parent(channel)
        local = LocalRun(run_id=run_id, flow_runs=NoFlowRuns(name), read_runs=parent.read_runs)
        try:
            ending = _run(entrypoint, Path(root) if root else None, parameters, local, name)
        except _Stopped:
            return 128 + signal.SIGTERM
        parent.report(ending)
    return 0


def _stop(_signum: int, _frame: object) -> None:
    stop_retrying()
    raise _Stopped


def _run(entrypoint: str, root: Path | None, parameters: dict[str, Any], local: LocalRun, name: str) -> Ending:
    try:
        flow = load_flow(entrypoint, root)
        with entering_flow_run(local, name=name, flow=flow, parameters=parameters):
            result = call_flow(flow, parameters)
            if isinstance(result, Coroutine):
                asyncio.run(result)
    except Exception as exc:  # noqa: BLE001 - a flow may raise anything; the run records it
        return describe_failure(exc)
    return Ending(state_type="COMPLETED", summary=local.summary)


class _Parent:
    """The process that keeps the flow runs, seen from one of them: lines of JSON over a socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._file = channel.makefile("rwb")

    def read_runs(self) -> list[StepOutcome]:
        self._send({"kind": "runs"})
        return OUTCOMES.validate_json(self._file.readline())

    def report(self, ending: Ending) -> None:
        self._send({"kind": "ended", "ending": asdict(ending)})

    def _send(self, message: dict[str, Any]) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()
