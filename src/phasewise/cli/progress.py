"""Run a deployment on the server and follow it and everything below it until it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from phasewise.errors import ServerUnreachable
from phasewise.orchestration.run_history import read_batch_runs
from phasewise.orchestration.run_reads import describe_run
from phasewise.outcomes import StepOutcome

#: Seconds between two looks: people watch, and each look costs the server a few reads.
_LOOK_SECONDS = 1.0
#: Seconds that a cancelled run gets to end before we leave it to its worker.
_CANCEL_SECONDS = 15.0
#: Seconds that a server gets to come back: one that died is started again, which takes less.
_PATIENCE_SECONDS = 120.0


def run_deployment(
    name: str, *, environment: Mapping[str, str], show: Callable[[Sequence[StepOutcome]], None]
) -> StepOutcome:
    """Start a flow run of the deployment *name*, wait until it is final and return its outcome.

    *environment* is set for the run, over what the deployment says; it must hold no secrets. *show* gets the run and
    all runs below it, about once a second. Interrupted (Ctrl-C), the run is cancelled before the command ends.

    Raises:
        ServerUnreachable: the server went away and did not come back.
    """
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(name)
        run = client.create_flow_run_from_deployment(
            deployment.id, name=name.partition("/")[0], job_variables={"env": dict(environment)}
        )
        try:
            return _follow(client, run, show)
        except BaseException:
            _cancel(client, run)
            raise


def _follow(client: SyncPrefectClient, run: FlowRun, show: Callable[[Sequence[StepOutcome]], None]) -> StepOutcome:
    heard = time.monotonic()
    while True:
        try:
            runs = read_batch_runs(str(run.id))
            heard = time.monotonic()
        except httpx.HTTPError as exc:  # a server that restarts is asked again; the run itself does not depend on us
            if time.monotonic() - heard > _PATIENCE_SECONDS:
                raise ServerUnreachable(
                    f"The Prefect server has not answered for {_PATIENCE_SECONDS:g} s ({type(exc).__name__}).",
                    hint=f"Start it again (make up), then: phasewise resume {run.id}",
                ) from exc
            runs = []
        if runs:
            show(runs)
            if runs[0].is_final:
                return runs[0]
        time.sleep(_LOOK_SECONDS)


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    with suppress(httpx.HTTPError):  # without a server nothing can be cancelled, and the interruption continues
        client.set_flow_run_state(run.id, Cancelling(message="The command that started it was interrupted."))
        deadline = time.monotonic() + _CANCEL_SECONDS
        while time.monotonic() < deadline and not describe_run(client.read_flow_run(run.id)).is_final:
            time.sleep(0.2)
