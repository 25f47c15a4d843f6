"""The deployments, the work pool and its work queues as data; deploy them, and check that a run could start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

from phasewise.errors import DeploymentMissing, NoWorkerOnline, OrchestrationError, PipelineInvalid
from phasewise.orchestration.batches import read_project
from phasewise.orchestration.deadlock import check_deadlock
from phasewise.orchestration.diagnose import has_worker, read_limits
from phasewise.orchestration.run_reads import read_pages
from phasewise.project.pipeline import MAIN_ETL, Phase, list_steps
from phasewise.settings import Settings

DEFAULT_WORKER_TYPE = "warm-process"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment as it should be on the server."""

    flow_name: str
    name: str
    #: ``module.function``, or ``file.py:function`` below the project's folder.
    entrypoint: str
    work_queue: str
    #: Folder that a file entry point is relative to.
    root: Path | None = None

    @property
    def full_name(self) -> str:
        return f"{self.flow_name}/{self.name}"


def list_deployments(phases: Sequence[Phase], root: Path, *, main: str | None = None) -> list[Deployment]:
    """Return the seven, main_etl's first, and one more for each step of *phases* that brings its own code.

    *main* is another name for the deployment of ``main_etl``: one that belongs to a single project of a server.
    """
    main_etl = MAIN_ETL if main is None else replace(MAIN_ETL, deployment=f"{MAIN_ETL.flow_name}/{main}")
    steps = [main_etl, *list_steps(MAIN_ETL.phases), *list_steps(phases)]
    found = {
        step.deployment: Deployment(
            flow_name=step.flow_name,
            name=step.deployment.partition("/")[2],
            entrypoint=step.entrypoint,
            work_queue=step.work_queue,
            root=root if ".py:" in step.entrypoint else None,
        )
        for step in steps
        if step.entrypoint
    }
    return list(found.values())


async def deploy(
    deployments: Iterable[Deployment],
    *,
    pool: str,
    settings: Settings,
    phases: Sequence[Phase] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[Mapping[str, str]]:
    """Create or update *deployments* on the server, with the work pool and its two queues where they are missing.

    What is there already as it should be is left alone, so deploying twice changes nothing. *environment* is what
    the flow runs need to find their project; it must hold no secrets, since deployments are readable by everyone.
    *phases* is what ``main_etl`` will run with them.

    Returns the environment that each deployment gave to its runs until now; empty where that is new, or the same.

    Raises:
        PipelineInvalid: with the limits of the server, *phases* could wait for themselves for ever.
        PipelineInvalid: the code of a step cannot be loaded, or its flow has another name than its deployment.
    """
    async with get_client() as client:
        await _ensure_pool(client, pool, settings)
        deployments = list(deployments)
        if phases:
            await _check_deadlock(client, pool, phases, deployments, environment)
        return [await _apply(client, deployment, pool, environment) for deployment in deployments]


async def _check_deadlock(
    client: PrefectClient,
    pool: str,
    phases: Sequence[Phase],
    deployments: Sequence[Deployment],
    environment: Mapping[str, str],
) -> None:
    limits = await read_limits(client, pool)
    # A project runs one batch at a time, but those of several projects share the slots.
    projects = {read_project({"env": environment})} | await _list_projects(client, pool)
    work_queues = {deployment.full_name: deployment.work_queue for deployment in deployments}
    check_deadlock(phases, limits, work_queues=work_queues, batches=len(projects))


async def _list_projects(client: PrefectClient, pool: str) -> set[str | None]:
    """Return the projects that the pool has a deployment of ``main_etl`` for."""
    found = await read_pages(
        client.read_deployments,
        flow_filter=FlowFilter(name=FlowFilterName(any_=[MAIN_ETL.flow_name])),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
    )
    return {read_project(one.job_variables) for one in found} - {None}


async def check_ready(deployments: Iterable[Deployment], *, pool: str) -> None:
    """Check that a run could start now: the deployments exist and a worker is online.

    Raises:
        DeploymentMissing, NoWorkerOnline: what is missing, and the command that fixes it.
    """
    async with get_client() as client:
        names = [deployment.full_name for deployment in deployments]
        missing = [name for name in names if await _read_deployment(client, name) is None]
        if missing:
            raise DeploymentMissing(
                f"The server lacks {len(missing)} of {len(names)} deployments: {', '.join(missing)}.",
                hint="Create them: make deploy-flows",
            )
        if not await has_worker(client, pool):
            raise NoWorkerOnline(
                f'No worker of the work pool "{pool}" is online, so nothing would start.',
                hint="Start one: make start-workers N=1",
            )


async def _ensure_pool(client: PrefectClient, name: str, settings: Settings) -> None:
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        await _create_pool(client, name)
    limits = {"orchestrators": settings.orchestrator_concurrency, "tables": settings.table_concurrency}
    queues = {queue.name for queue in await client.read_work_queues(work_pool_name=name)}
    for queue, limit in limits.items():
        if queue not in queues:
            await client.create_work_queue(queue, work_pool_name=name, concurrency_limit=limit)


async def _create_pool(client: PrefectClient, name: str) -> None:
    template = await get_default_base_job_template_for_infrastructure_type(DEFAULT_WORKER_TYPE)
    create = WorkPoolCreate(name=name, type=DEFAULT_WORKER_TYPE, base_job_template=template or {})
    with suppress(ObjectAlreadyExists):  # another deploy was faster
        await client.create_work_pool(create)


async def _apply(
    client: PrefectClient, deployment: Deployment, pool: str, environment: Mapping[str, str]
) -> Mapping[str, str]:
    flow = _load_flow(deployment)
    wanted = _describe(deployment, flow, pool, environment)
    existing = await _read_deployment(client, deployment.full_name)
    if existing is not None and _is_like(existing, wanted):
        return {}
    flow_id: UUID = await client.create_flow(flow)
    await client.create_deployment(flow_id, deployment.name, **wanted)
    before: Mapping[str, str] | None = (existing.job_variables or {}).get("env") if existing is not None else None
    return before or {}


def _load_flow(deployment: Deployment) -> Flow[..., Any]:
    entrypoint = deployment.entrypoint
    if deployment.root is not None:
        entrypoint = str(deployment.root / entrypoint)
    try:
        flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except Exception as exc:
        raise PipelineInvalid(f'The code of "{deployment.full_name}" ({entrypoint}) cannot be loaded: {exc}') from exc
    if flow.name != deployment.flow_name:
        raise PipelineInvalid(
            f'{entrypoint} is the flow "{flow.name}", but the step names "{deployment.full_name}".',
            hint=f'Write deployment="{flow.name}/{deployment.name}".',
        )
    return flow


def _describe(
    deployment: Deployment, flow: Flow[..., Any], pool: str, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return the arguments of ``create_deployment``."""
    pull_steps: list[dict[str, Any]] = []
    if deployment.root is not None:
        step = "prefect.deployments.steps.set_working_directory"
        pull_steps = [{step: {"directory": str(deployment.root)}}]
    return {
        "work_pool_name": pool,
        "work_queue_name": deployment.work_queue,
        "entrypoint": deployment.entrypoint,
        "tags": ["phasewise"],
        "description": flow.description or "",
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "enforce_parameter_schema": True,
        "job_variables": {"env": dict(environment)} if environment else {},
        "pull_steps": pull_steps,
    }


def _is_like(existing: DeploymentResponse, wanted: Mapping[str, Any]) -> bool:
    # The server has None for what is empty here, or the other way round.
    return all((getattr(existing, key) or None) == (value or None) for key, value in wanted.items())


async def _read_deployment(client: PrefectClient, full_name: str) -> DeploymentResponse | None:
    try:
        return await client.read_deployment_by_name(full_name)
    except ObjectNotFound:
        return None
    except httpx.HTTPStatusError as exc:
        raise OrchestrationError(f"The server answered {exc.response.status_code} for {full_name}.") from exc
