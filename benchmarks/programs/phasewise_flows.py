"""The topology on phasewise: its flows, and ``python phasewise_flows.py POOL`` to deploy them."""

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow, runtime, task

from phasewise import FanOut, Phase, Step, run_phases

if TYPE_CHECKING:
    from phasewise.orchestration.deployments import Deployment


@task
def pause(seconds: float) -> None:
    time.sleep(seconds)


@flow(name="bench-main")
async def main(tables: int, seconds: float) -> None:
    short = {"seconds": seconds / 3}
    sub_parameters = {"tables": tables, "seconds": seconds}
    load = [
        Step(name="pre", deployment="bench-pre/bench", parameters=short),
        Step(name="sub", deployment="bench-sub/bench", parameters=sub_parameters),
    ]
    publish = [Step(name="final", deployment="bench-final/bench", parameters=short)]
    await run_phases([Phase(name="load", steps=load), Phase(name="publish", steps=publish)], batch=_run_id())


@flow(name="bench-sub")
async def sub(tables: int, seconds: float) -> None:
    names = [f"table-{number:03}" for number in range(tables)]
    table_step = FanOut(
        name="table", deployment="bench-table/bench", parameters={"seconds": seconds}, over="table", items=names
    )
    short = {"seconds": seconds / 3}
    cleanups = [Step(name=f"cleanup{n}", deployment=f"bench-cleanup{n}/bench", parameters=short) for n in (1, 2)]
    await run_phases([Phase(name="tables", steps=[table_step]), Phase(name="cleanup", steps=cleanups)], batch=_run_id())


@flow(name="bench-table")
def table(table: str, seconds: float) -> None:
    pause(seconds)


@flow(name="bench-pre")
def pre(seconds: float) -> None:
    pause(seconds)


@flow(name="bench-cleanup1")
def cleanup1(seconds: float) -> None:
    pause(seconds)


@flow(name="bench-cleanup2")
def cleanup2(seconds: float) -> None:
    pause(seconds)


@flow(name="bench-final")
def final(seconds: float) -> None:
    pause(seconds)


def _run_id() -> str:
    run_id = runtime.flow_run.id
    assert run_id is not None
    return str(run_id)


def list_deployments() -> "list[Deployment]":
    from phasewise.orchestration.deployments import Deployment

    file = Path(__file__)
    queues = dict.fromkeys(("main", "pre", "sub", "final"), "orchestrators")
    queues |= dict.fromkeys(("table", "cleanup1", "cleanup2"), "tables")
    return [
        Deployment(
            flow_name=f"bench-{name}",
            name="bench",
            entrypoint=f"{file.name}:{name}",
            work_queue=queue,
            root=file.parent,
        )
        for name, queue in queues.items()
    ]


def deploy(pool: str) -> None:
    from phasewise.orchestration.deployments import deploy as deploy_all
    from phasewise.settings import Settings

    asyncio.run(deploy_all(list_deployments(), pool=pool, settings=Settings()))


if __name__ == "__main__":
    deploy(sys.argv[1])
