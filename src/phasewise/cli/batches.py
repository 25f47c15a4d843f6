"""The commands that act on a batch while it runs or after it failed: cancel, resume, why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from cyclopts import App, Parameter

from phasewise.project.config import find_project
from phasewise.settings import Settings

_Batch = Annotated[str | None, Parameter(help="Id of the batch, or its first characters. Default: the newest batch.")]


def add_batch_commands(
    app: App, choose_server: Callable[[], Settings], run_main: Callable[[Settings, str], None]
) -> None:
    """Add the commands to *app*.

    *choose_server* decides which server they talk to; *run_main* continues a batch in this process.
    """

    @app.command
    def cancel(batch: _Batch = None, /) -> None:
        """Cancel a running batch and everything below it. What it staged is kept for a resume."""
        project = find_project(choose_server())
        from prefect.client.schemas.objects import StateType

        from phasewise.orchestration.batches import cancel_batch, find_batch

        active = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING]
        found = asyncio.run(find_batch(project, batch, states=active))
        count = asyncio.run(cancel_batch(found.id))
        print(f"Cancelled batch {found.id}: {count} flow runs were asked to end.")
        print(f"Resume it with: phasewise resume {found.id}")

    @app.command
    def why(run: Annotated[str, Parameter(help="Id of the flow run.")], /) -> None:
        """Say why a flow run has not started yet, and what would start it."""
        choose_server()
        from phasewise.orchestration.diagnose import explain_waiting

        for reason in asyncio.run(explain_waiting(run)):
            print(reason)

    @app.command
    def resume(batch: _Batch = None, /) -> None:
        """Resume a batch that did not complete: run only what is not done yet.

        A batch that was started with `phasewise run` continues in this command, any other on the workers.
        """
        settings = choose_server()
        project = find_project(settings)
        from prefect.client.schemas.objects import StateType
        from prefect.utilities.urls import url_for

        from phasewise.orchestration.batches import find_batch, resume_batch

        ended = [StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
        found = asyncio.run(find_batch(project, batch, states=ended))
        if found.deployment_id is None:  # no worker runs it
            print(f"Batch {found.id} was started in its own process. It continues in this one.", flush=True)
            run_main(settings, str(found.id))
        else:
            asyncio.run(resume_batch(str(found.id)))
            print(f"Batch {found.id} is scheduled again. Follow it at {url_for(found)}")
