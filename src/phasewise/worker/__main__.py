"""The command of a worker, ``python -m phasewise.worker``. Runs in the worker's process."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.abc
from prefect.workers.base import BaseWorker

from phasewise.settings import Settings
from phasewise.worker.worker import WarmProcessWorker


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phasewise.worker", description="Started by the stack.")
    parser.add_argument("--pool", required=True, help="name of the work pool")
    parser.add_argument("--name", required=True, help="name of this worker")
    parser.add_argument("--type", default=WarmProcessWorker.type, help="type of the worker and of a new pool")
    options = parser.parse_args(argv)
    worker_class = BaseWorker.get_worker_class_from_type(options.type)
    if worker_class is None:
        parser.error(f"unknown type {options.type!r}")
    asyncio.run(_serve(worker_class(work_pool_name=options.pool, name=options.name)))
    return 0


async def _serve(worker: BaseWorker[Any, Any, Any]) -> None:
    """Run *worker* until SIGTERM or SIGINT."""
    stop = anyio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with anyio.create_task_group() as group:

        async def work() -> None:
            await worker.start(printer=worker._logger.info)
            group.cancel_scope.cancel()

        group.start_soon(work)
        await stop.wait()
        if isinstance(worker, WarmProcessWorker):
            await worker.drain(Settings().drain_seconds)
        group.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(main())
