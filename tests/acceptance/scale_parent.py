"""Waits for many children like a parent would, and prints as JSON what that cost: API calls and memory."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httpx

from phasewise import FanOut, Phase
from phasewise.orchestration.phases import start_phase
from phasewise.orchestration.prefect_runs import PrefectFlowRuns


async def main(count: int, folder: str) -> None:
    calls = 0
    send = httpx.AsyncClient.send

    async def counting_send(self: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        nonlocal calls
        calls += 1
        return await send(self, request, **options)  # type: ignore[arg-type]

    httpx.AsyncClient.send = counting_send  # type: ignore[method-assign, assignment]
    names = [f"n{number}" for number in range(count)]
    step = FanOut(
        name="leaves", deployment="leaf/never-started", over="name", items=names, parameters={"folder": folder}
    )
    started = await start_phase(Phase(steps=[step]), batch=folder, flow_runs=PrefectFlowRuns(poll_seconds=15))
    triggering, calls = calls, 0
    print(json.dumps({"triggering": triggering}), flush=True)
    outcome = await started.wait()
    peak_mib = read_peak_mib()
    print(json.dumps({"waiting": calls, "completed": len(outcome.steps), "peak_mib": peak_mib}), flush=True)


def read_peak_mib() -> float:
    # Not ru_maxrss, which begins with the size of whoever started this process.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
