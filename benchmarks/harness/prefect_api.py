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


def _final(api: str, run_id: str) -> dict[str, Any] | None:
    run: dict[str, Any] = request(f"{api}/flow_runs/{run_id}")
    return run if run["state"]["type"] in _FINAL else None


def seconds(timestamp: str) -> float:
    """Return an ISO timestamp as seconds since the epoch."""
    return datetime.datetime.fromisoformat(timestamp).timestamp()
