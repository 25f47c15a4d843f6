"""The one task run that links a whole fan-out to its parent in Prefect's graph, and the state that it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import httpx
from prefect import Task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.logging import get_logger
from prefect.states import Completed, Failed, Pending, Running

from phasewise.orchestration.flow_runs import RunRequest
from phasewise.outcomes import StepOutcome
from phasewise.project.pipeline import FAN_OUT_TAG


def group_of(request: RunRequest) -> str:
    """Return what names the node of *request* among the task runs of its parent; each of ``_submit`` has a key."""
    return request.group or request.key or request.deployment


async def link_to_parent(client: PrefectClient, requests: Sequence[RunRequest]) -> dict[str, UUID]:
    """Return for each group the task run of the current flow run that stands for it, creating what is missing.

    The server nests a child below the flow run of its parent task run. A fan-out needs only one of them: the graph
    draws every flow run that points to it. The dynamic key is the group, so a retry finds the one it made before.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return {}
    links: dict[str, UUID] = {}
    for group, count in Counter(map(group_of, requests)).items():
        deployment = next(request.deployment for request in requests if group_of(request) == group)
        task: Task[..., None] = Task(name=deployment, fn=_stand_in)
        link = await client.create_task_run(
            task,
            flow_run_id=context.flow_run.id,
            dynamic_key=group,
            name=deployment,
            state=Running() if count > 1 else Pending(),
            extra_tags=[FAN_OUT_TAG] if count > 1 else [],
        )
        links[group] = link.id
        if count > 1 and link.state is not None and link.state.is_final():
            await client.set_task_run_state(link.id, Running(), force=True)
    return links


def _stand_in() -> None:
    """The body of the task run that stands for a child; the child's own states are copied to it by the server."""


def find_fan_outs(
    requests: Sequence[RunRequest], links: Mapping[str, UUID], run_ids: Sequence[str]
) -> list[FanOutLink]:
    members: dict[str, list[str]] = {group: [] for group in links}
    for request, run_id in zip(requests, run_ids, strict=True):
        members.setdefault(group_of(request), []).append(run_id)
    return [
        FanOutLink(links[group], frozenset(ids)) for group, ids in members.items() if group in links and len(ids) > 1
    ]


@dataclass
class FanOutLink:
    """The task run that stands for a whole fan-out, and what is known of its flow runs.

    The server copies each state of a child to its parent's task run: of twenty children, forty states that replace
    each other. Ours leaves that to the parent (``phasewise.server.statements``), which says once how all of
    them have ended.
    """

    link: UUID
    run_ids: frozenset[str]
    _completed: dict[str, bool] = field(default_factory=dict)

    async def note(self, outcome: StepOutcome, client: PrefectClient) -> None:
        """Note how a run has ended; after the last one, set the state of the task run."""
        if outcome.run_id not in self.run_ids:
            return
        self._completed[outcome.run_id] = outcome.is_completed
        if len(self._completed) < len(self.run_ids):
            return
        if failed := list(self._completed.values()).count(False):
            await self._say(Failed(message=f"{failed} of {len(self.run_ids)} flow runs did not complete."), client)
        else:
            await self._say(Completed(message=f"All {len(self.run_ids)} flow runs completed."), client)

    async def reopen(self, run_ids: Collection[str], client: PrefectClient) -> None:
        """Forget how those runs ended that now run again."""
        if again := self.run_ids.intersection(run_ids):
            for run_id in again:
                self._completed.pop(run_id, None)
            await self._say(Running(), client)

    async def _say(self, state: State[None], client: PrefectClient) -> None:
        try:
            await client.set_task_run_state(self.link, state, force=True)
        except httpx.HTTPError as exc:  # what it shows is also to be seen of the flow runs
            get_logger("phasewise.orchestration.flow_runs").warning(
                "Could not update the task run of a fan-out: %s", exc
            )
