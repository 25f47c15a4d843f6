"""Flows for the tests of local runs: plain Prefect, as a user writes them."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

from prefect import flow, get_run_logger, runtime, task

from phasewise import FanOut, Phase, run_phases, trigger_subflow
from phasewise.orchestration.flow_runs import LOCAL_RUN, report_summary
from tests.unit.orchestration.flow_runs_contract import is_marked, note, until


@flow(name="work")
def work(folder: str, item: str, rows: int = 1) -> None:
    note(folder, item)
    if is_marked(folder, f"{item}.broken"):
        raise ValueError(f"{item} is broken")
    report_summary({"rows": rows})


@flow(name="crash")
def crash(folder: str, item: str) -> None:
    if is_marked(folder, f"{item}.broken"):
        os.kill(os.getpid(), signal.SIGKILL)


@flow(name="stuck")
def stuck(folder: str, item: str) -> None:
    try:
        note(folder, item)
        time.sleep(3600)
    finally:
        note(folder, f"cleaned up {item}")


@flow(name="stubborn")
def stubborn(folder: str, item: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(folder, str(os.getpid()))
    time.sleep(3600)


@flow(name="overlapping")
def overlapping(folder: str, item: str) -> None:
    """Note how many of these run at this moment."""
    mark = Path(folder) / f"{item}.running"
    mark.touch()
    note(folder, str(len(list(Path(folder).glob("*.running")))))
    time.sleep(0.1)
    mark.unlink()


@flow(name="nested")
async def nested(folder: str, depth: int, deployment: str = "work/d") -> None:
    """Run itself *depth* levels deep, and two items at the bottom."""
    run_id = runtime.flow_run.id
    if depth:
        step = FanOut(
            name="below",
            deployment="nested/d",
            over="folder",
            items=[folder],
            parameters={"depth": depth - 1, "deployment": deployment},
        )
    else:
        step = FanOut(name="items", deployment=deployment, over="item", items=["a", "b"], parameters={"folder": folder})
    await run_phases([Phase(name="only", steps=[step])], batch=str(run_id))


@flow(name="careless")
async def careless(folder: str) -> None:
    """Start a flow run and fail without waiting for it."""
    await trigger_subflow("stuck/d", {"folder": folder, "item": "left"})
    await until(lambda: is_marked(folder, "log"))
    raise ValueError("not my day")


@flow(name="leaf")
async def leaf() -> None:
    await trigger_subflow("work/d", {})


_tries: list[int] = []


@task(retries=2, retry_delay_seconds=timedelta(seconds=0).total_seconds())
def twice_broken() -> str:
    _tries.append(1)
    if len(_tries) < 3:
        raise ValueError("not yet")
    return "third time"


@task
def double(number: int) -> int:
    return 2 * number


@task
async def triple(number: int) -> int:
    return 3 * number


@flow(name="inner")
def inner(number: int) -> int:
    return number + 1


@flow(name="outer")
async def outer(folder: str, count: int) -> None:
    get_run_logger().info("logged as anywhere")
    future = double.submit(count)
    report_summary(
        {
            "id": runtime.flow_run.id,
            "name": runtime.flow_run.name,
            "retried": twice_broken(),
            "submitted": double.submit(future).result(),
            "mapped": sum(double.map([1, 2, 3]).result()),
            "awaited": await triple(count),
            "inner": inner(count),
        }
    )


@flow(name="look")
def look() -> None:
    """Sum up what a flow run can see of the others."""
    local = LOCAL_RUN.get()
    assert local is not None
    report_summary({run.run_id: run.state_type for run in local.read_runs()})
