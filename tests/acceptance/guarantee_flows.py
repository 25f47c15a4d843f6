"""Flows that the guarantees are tried on: they wait until told to go on, fail when told to, nest three levels deep.

A run looks for files in the folder SIGNALS: ``<name>.fail`` makes it fail, ``<name>.fail-once`` makes its first
attempt fail, ``<name>.hold`` makes it wait until that is removed, ``<name>.stubborn`` makes it ignore SIGTERM. It
leaves ``<name>.<attempt>.pid`` there.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from phasewise import BATCH, FanOut, Phase, Step, run_phases
from phasewise.orchestration.flow_runs import report_summary
from phasewise.orchestration.prefect_runs import PrefectFlowRuns


def act(folder: str, name: str) -> dict[str, Any]:
    """Do what the signals for *name* say."""
    signals = Path(folder)
    (signals / f"{name}.{flow_run.run_count}.pid").write_text(str(os.getpid()))
    if (signals / f"{name}.stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while (signals / f"{name}.hold").exists():
        time.sleep(0.02)
    if (signals / f"{name}.fail").exists():
        raise ValueError(f"{name} was told to fail")
    if (signals / f"{name}.fail-once").exists() and flow_run.run_count == 1:
        raise ValueError(f"{name} was told to fail once")
    summary = {"name": name, "rows": len(name), "attempt": flow_run.run_count}
    report_summary(summary)
    return summary


@flow(name="leaf")
def leaf(name: str, folder: str) -> dict[str, Any]:
    return act(folder, name)


def leaves(folder: str, *names: str, **options: Any) -> FanOut:
    return FanOut(
        name="leaves",
        deployment="leaf/leaf-deployment",
        over="name",
        items=names,
        parameters={"folder": folder},
        **options,
    )


@flow(name="middle")
async def middle(folder: str, names: list[str], batch_id: str) -> dict[str, Any]:
    """The second level: fans out over leaves."""
    outcome = await run_phases([Phase(steps=[leaves(folder, *names)])], batch=batch_id, flow_runs=patient())
    return {"leaves": len(outcome.phases[0].steps)}


@flow(name="top")
async def top(
    folder: str,
    names: list[str],
    levels: int = 1,
    on_failure: str = "wait",
    allow_failed: str = "0",
    timeout: float | None = None,
    last: str = "last",
) -> dict[str, Any]:
    """The first level: leaves (or middles that fan out over them), then one leaf more in a second phase."""
    work: Step = leaves(folder, *names, allow_failed=allow_failed, timeout=timeout)
    if levels > 1:
        work = Step(
            name="middle",
            deployment="middle/middle-deployment",
            parameters={"folder": folder, "names": names, "batch_id": BATCH},
        )
    end = Step(name="last", deployment="leaf/leaf-deployment", parameters={"folder": folder, "name": last})
    phases = [Phase(steps=[work], on_failure=on_failure), Phase(steps=[end])]  # type: ignore[arg-type]
    outcome = await run_phases(phases, batch=str(flow_run.id), flow_runs=patient())
    return {"tolerated": [step.item for step in outcome.phases[0].tolerated]}


@flow(name="again", retries=1)
async def again(folder: str, names: list[str]) -> None:
    """Prefect runs it again in the same process when it fails."""
    await run_phases([Phase(steps=[leaves(folder, *names)])], batch=str(flow_run.id), flow_runs=patient())


@flow(name="apex")
async def apex(folder: str, names: list[str]) -> None:
    """An orchestrator above an orchestrator above an orchestrator."""
    parameters = {"folder": folder, "names": names, "levels": 2}
    await run_phases(
        [Phase(steps=[Step(name="top", deployment="top/top-deployment", parameters=parameters)])],
        batch=str(flow_run.id),
        flow_runs=patient(),
    )


def patient() -> PrefectFlowRuns:
    return PrefectFlowRuns(poll_seconds=10)
