"""The topology on stock Prefect, as it is commonly written: ``run_deployment`` for each child, waiting by polling.

``python stock_flows.py POOL`` deploys it.
"""

import asyncio
import sys
import time
from pathlib import Path

from prefect import flow, task
from prefect.deployments import run_deployment  # noqa: TID251 - it is what is measured


@task
def pause(seconds: float) -> None:
    time.sleep(seconds)


@flow(name="bench-main")
async def main(tables: int, seconds: float) -> None:
    short = {"seconds": seconds / 3}
    sub_parameters = {"tables": tables, "seconds": seconds}
    await asyncio.gather(
        run_deployment("bench-pre/bench", parameters=short),
        run_deployment("bench-sub/bench", parameters=sub_parameters),
    )
    await run_deployment("bench-final/bench", parameters=short)


@flow(name="bench-sub")
async def sub(tables: int, seconds: float) -> None:
    await asyncio.gather(*(run_deployment("bench-table/bench", parameters={"seconds": seconds}) for _ in range(tables)))
    short = {"seconds": seconds / 3}
    await asyncio.gather(*(run_deployment(f"bench-cleanup{number}/bench", parameters=short) for number in (1, 2)))


@flow(name="bench-table")
def table(seconds: float) -> None:
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


def deploy(pool: str) -> None:
    file = Path(__file__)
    for one in (main, pre, sub, table, cleanup1, cleanup2, final):
        source = one.from_source(source=str(file.parent), entrypoint=f"{file.name}:{one.fn.__name__}")
        source.deploy(name="bench", work_pool_name=pool, print_next_steps=False)


if __name__ == "__main__":
    deploy(sys.argv[1])
