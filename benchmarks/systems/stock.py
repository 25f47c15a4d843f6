"""Stock Prefect: its server on SQLite and its process worker, with their defaults."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import prefect_api, processes
from benchmarks.systems import Context, Submit
from benchmarks.systems.programs import PROGRAMS

_POOL = "bench"


class Stock:
    """Prefect as it comes, of the same version as phasewise uses."""

    #: It takes minutes for 20.
    most_tables: int | None = 20

    def version(self) -> str:
        return version("prefect")

    @contextlib.contextmanager
    def running(self, context: Context) -> Iterator[Submit]:
        with self.serving(context) as api:
            yield lambda load: prefect_api.run_topology(api, load)

    @contextlib.contextmanager
    def serving(self, context: Context) -> Iterator[str]:
        """Run server and worker with the topology deployed for the time of the block; yield the API's address."""
        home, port = context.home, processes.free_port()
        api = f"http://127.0.0.1:{port}/api"
        env = processes.clean_environment(
            PREFECT_HOME=str(home / "prefect"), PREFECT_API_URL=api, PREFECT_SERVER_ANALYTICS_ENABLED="false"
        )
        common: dict[str, Any] = {"env": env, "cwd": home}
        prefect = Path(sys.executable).with_name("prefect")
        server = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        worker = [prefect, "worker", "start", "--pool", _POOL, "--type", "process"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(processes.service(server, log=home / "server.log", **common))
            processes.wait_until(lambda: processes.request(f"{api}/health"), "the server", seconds=120)
            stack.enter_context(processes.service(worker, log=home / "worker.log", **common))
            online = f"{api}/work_pools/{_POOL}/workers/filter"
            processes.wait_until(lambda: processes.request(online, {}), "the worker", seconds=120)
            processes.run([sys.executable, PROGRAMS / "stock_flows.py", _POOL], log=home / "deploy.log", **common)
            yield api
