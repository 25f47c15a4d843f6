"""The little of Prefect's REST API that the benchmark needs: no import of Prefect, so none of its cost either."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.load import Load, Measured
from benchmarks.harness.processes import Broken, request, wait_until

_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def create_run(api: str, deployment: str, parameters: Mapping[str, Any]) -> str:
    """Schedule a run of *deployment* (``flow/deployment``) for now; return its id."""
    deployment_id = request(f"{api}/deployments/name/{deployment}")["id"]
    body = {"parameters": dict(parameters), "state": {"type": "SCHEDULED"}}
    run_id: str = request(f"{api}/deployments/{deployment_id}/create_flow_run", body)["id"]
    return run_id


def run_topology(api: str, load: Load) -> Measured:
    """Run ``bench-main/bench`` and return its times as the server recorded them."""
    run_id = create_run(api, "bench-main/bench", {"tables": load.tables, "seconds": load.seconds})
    # The times are the server's own, so looking rarely costs no precision, and looking often would cost it CPU time.
    run = wait_until(lambda: _final(api, run_id), "bench-main", seconds=900, pause=1)
    if run["state"]["type"] != "COMPLETED":
        raise Broken(f"bench-main ended {run['state']['name']}: {run['state']['message']}")
    return Measured(submitted=seconds(run["created"]), completed=seconds(run["end_time"]))


def read_start(api: str, run_id: str) -> float | None:
    """Return the seconds from Scheduled to Running as the server recorded them; None while the run is not final."""
    if _final(api, run_id) is None:
        return None
    states = {
        state["name"]: seconds(state["timestamp"]) for state in request(f"{api}/flow_run_states/?flow_run_id={run_id}")
    }
    return states["Running"] - states["Scheduled"]


def is_running(api: str, run_id: str) -> bool:
    running: bool = request(f"{api}/flow_runs/{run_id}")["state"]["type"] == "RUNNING"
    return running


def _final(api: str, run_id: str) -> dict[str, Any] | None:
    run: dict[str, Any] = request(f"{api}/flow_runs/{run_id}")
    return run if run["state"]["type"] in _FINAL else None


def seconds(timestamp: str) -> float:
    """Return an ISO timestamp as seconds since the epoch."""
    return datetime.datetime.fromisoformat(timestamp).timestamp()
