"""The ``phasewise`` command, and the table of its exit codes.

Prefect takes seconds to import, so it is imported by the commands that need it, after the environment that decides
which server they talk to is known.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from phasewise import __version__
from phasewise.cli.batches import add_batch_commands
from phasewise.cli.warehouse import add_warehouse_commands
from phasewise.errors import (
    AuditFailed,
    BatchCancelled,
    FlowRunsFailed,
    LakeError,
    OrchestrationError,
    PhasewiseError,
    ProjectError,
    ServerUnreachable,
    SourceError,
    StagingError,
    UnknownBatch,
)
from phasewise.project.config import Project, find_project, load_project
from phasewise.settings import Settings, find_checkout, find_home

DEFAULT_API_URL = "http://127.0.0.1:4200/api"

#: Exit code, the errors that lead to it (the first that fits counts), what it means.
EXIT_CODES: tuple[tuple[int, tuple[type[BaseException], ...], str], ...] = (
    (0, (), "done; for run and run-distributed: the warehouse was published"),
    (2, (CycloptsError,), "the command line was not understood"),
    (3, (ProjectError,), "phasewise.toml or a setting is missing or malformed, or names a table that is not there"),
    (4, (SourceError,), "the source database does not answer or is not as declared"),
    (5, (StagingError, LakeError), "staging or the warehouse cannot be read or written"),
    (6, (AuditFailed,), "a blocking audit failed; nothing was published"),
    (
        7,
        (FlowRunsFailed, BatchCancelled),
        "flow runs did not complete; nothing was published, unless the message says so",
    ),
    (8, (OrchestrationError,), "the server, the deployments or the workers are missing or refused"),
    (1, (Exception,), "any other error"),
    (130, (KeyboardInterrupt,), "interrupted (Ctrl-C or SIGTERM); what was started has been stopped"),
)


def _describe_exit_codes() -> str:
    rows = "\n".join(f"| {code} | {meaning} |" for code, _, meaning in EXIT_CODES)
    return f"Exit codes:\n\n| code | meaning |\n| --- | --- |\n{rows}"


app = App(
    name="phasewise",
    version=__version__,
    help="Multi-phase ETL on Prefect: tables staged in parallel, audited, and published all at once or not at all.",
    help_epilogue=_describe_exit_codes(),
    help_format="markdown",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return an exit code of the table."""
    return run_command(lambda: app(arguments, exit_on_error=False, print_error=True, result_action="return_value"))


def run_command(command: Callable[[], Any]) -> int:
    """Run *command*; print an error as one message and return the exit code that belongs to it."""
    # SIGTERM (make, systemd, CI) ends a command the way Ctrl-C does: everything that it started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = command()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except CycloptsError:
        return 2
    except PhasewiseError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return find_exit_code(exc)
    except ValidationError as exc:
        if exc.title != Settings.__name__:
            raise
        for error in exc.errors():
            name = f"PHASEWISE_{error['loc'][0]}".upper()
            print(f"Error: {name} = {error['input']!r}: {error['msg']}.", file=sys.stderr)
        return 3
    return result if isinstance(result, int) else 0


def find_exit_code(error: BaseException) -> int:
    return next(code for code, errors, _ in EXIT_CODES if isinstance(error, errors))


@app.command
def up(
    *, workers: Annotated[int | None, Parameter(help="Workers to start; default: PHASEWISE_WORKERS.")] = None
) -> None:
    """Start a stack that stays: Prefect server with its UI, the work pool and workers."""
    from phasewise.stack.control import start_stack

    settings = Settings()
    stack = start_stack(find_home(settings), pool=_pool_name(), workers=workers or settings.workers)
    print(f"The stack is running. UI: {stack.ui_url}  API: {stack.api_url}")
    print("Next: make deploy-flows, then make run-distributed. Stop it with: make down")


@app.command
def down() -> None:
    """Stop the stack that `up` started, with all its workers."""
    from phasewise.stack.control import stop_stack

    print("The stack is stopped." if stop_stack(find_home(Settings())) else "No stack is running.")


@app.command
def start_workers(count: Annotated[int, Parameter(help="Workers to add.")] = 3, /) -> None:
    """Add workers to the running stack."""
    from phasewise.stack.control import start_workers as start

    stack = start(find_home(Settings()), count)
    print(f"{len(stack.workers)} workers are online: {', '.join(stack.workers)}")


@app.command
def deploy(
    *,
    main: Annotated[
        str | None, Parameter(help="Name for the deployment of main_etl, if a server has several projects.")
    ] = None,
) -> None:
    """Deploy the flows of the project: the seven built-in ones, and those of its own steps."""
    url = deploy_flows(choose_server(), main)
    print(f"Next: make start-workers (unless workers run), then run main-etl-job from {url.removesuffix('/api')},")
    print("or: python flows/prefect_flow-worker-flow-v2.py run")


def deploy_flows(settings: Settings, main: str | None = None) -> str:
    """Deploy, ``main_etl`` as *main*; print one line per deployment, and return the server's API URL."""
    project = _open_project(settings)
    url = check_server_answers()
    from phasewise.orchestration.deployments import deploy as deploy_all
    from phasewise.orchestration.deployments import list_deployments
    from phasewise.project.pipeline import load_phases

    print("🚀 Deploying flows to work pool...")
    phases = load_phases(project.root, project.pipeline.phases)
    planned = list_deployments(phases, project.root, main=main)
    environment = {"PHASEWISE_PROJECT": str(project.root)}
    deploying = deploy_all(planned, pool=_pool_name(), settings=settings, phases=phases, environment=environment)
    environment_before, *_ = asyncio.run(deploying)
    for deployment in planned:
        print(f"✅ Deployed: {deployment.flow_name}")
    print(f"🎉 All {len(planned)} deployments created successfully!")
    before = environment_before.get("PHASEWISE_PROJECT", str(project.root))
    if before != str(project.root):
        name = planned[0].full_name
        # What it writes to standard output is fixed.
        print(
            f"{name} ran {before} until now. From now on it runs {project.root}, and so do its schedules.",
            file=sys.stderr,
        )
        print("Give each project its own deployment with: phasewise deploy --main NAME", file=sys.stderr)
    return url


@app.command
def run(
    *,
    local: Annotated[
        bool, Parameter(negative="", help="Without a server: flow runs are processes below this one.")
    ] = False,
    resume: Annotated[str | None, Parameter(help="With --local: the batch to resume.")] = None,
) -> None:
    """Run main_etl in this process, its subflows through the work pool of the server."""
    if local:
        run_local(Settings(), resume)
    elif resume is not None:
        raise UnknownBatch("--resume works only with --local.", hint=f"On the server: phasewise resume {resume}")
    else:
        run_main(choose_server())


def run_local(settings: Settings, resume: str | None = None) -> None:
    """Run ``main_etl`` and everything below it in one process tree, without a server."""
    project = _open_project(settings)
    os.environ.pop("PREFECT_API_URL", None)
    _keep_home_clean(settings)
    os.environ["PHASEWISE_PROJECT"] = str(project.root)
    from phasewise.flows import main_etl
    from phasewise.local.batch import run_local

    asyncio.run(run_local(main_etl, _find_staged_batch(project, resume) if resume else None))
    print("The warehouse was published.")


def _find_staged_batch(project: Project, prefix: str) -> str:
    from phasewise.staging.batch import list_batches

    found = [batch.id for batch in list_batches(project) if batch.id.startswith(prefix.lower())]
    if len(found) != 1:
        raise UnknownBatch(
            f'{len(found) or "No"} batches in {project.staging} begin with "{prefix}".',
            hint="Name one of the folders there.",
        )
    return found[0]


def run_main(settings: Settings, resume: str | None = None) -> None:
    """Check that a run could start, then run ``main_etl`` in this process, or continue the batch *resume*."""
    project = _open_project(settings)
    check_server_answers()
    from phasewise.orchestration.deployments import check_ready, list_deployments
    from phasewise.project.pipeline import load_phases

    planned = list_deployments(load_phases(project.root, project.pipeline.phases), project.root)
    asyncio.run(check_ready(planned, pool=_pool_name()))
    os.environ["PHASEWISE_PROJECT"] = str(project.root)
    from phasewise.flows import main_etl
    from phasewise.orchestration.batches import run_here

    asyncio.run(run_here(main_etl, resume))


@app.command
def run_distributed() -> int:
    """Run the whole ETL as deployments on a work pool and show its progress.

    Uses the running stack and leaves it running. If there is none, starts one and stops it at the end.
    """
    from phasewise.stack.control import running_stack

    settings = Settings()
    project = _open_project(settings)
    if "PREFECT_API_URL" in os.environ:
        return _run_distributed(settings, project)
    with running_stack(find_home(settings), pool=_pool_name(), workers=settings.workers) as stack:
        _use_server(settings, stack.api_url)
        return _run_distributed(settings, project)


def _run_distributed(settings: Settings, project: Project) -> int:
    os.environ["PHASEWISE_PROJECT"] = str(project.root)
    deploy_flows(settings)
    from phasewise.cli.console import show_progress
    from phasewise.cli.progress import run_deployment
    from phasewise.orchestration.deployments import check_ready
    from phasewise.project.pipeline import MAIN_ETL

    # A server of the user's own may have no worker, and the run would wait for one without a word.
    asyncio.run(check_ready((), pool=_pool_name()))
    environment = {"PHASEWISE_PROJECT": str(project.root)}
    with show_progress() as show:
        outcome = run_deployment(MAIN_ETL.deployment, environment=environment, show=show)
    report = project.reports / f"{outcome.run_id}.html"
    if report.is_file():
        print(f"Report: {report}")
    elif outcome.is_completed:
        print("The report is missing; the log of final-etl-job says why.", file=sys.stderr)
    if outcome.is_completed:
        print("The warehouse was published.")
        return 0
    print(f"Error: {outcome.describe()}", file=sys.stderr)
    print(_describe_warehouse(project, outcome.run_id), file=sys.stderr)
    return find_exit_code(FlowRunsFailed([outcome]))


def _describe_warehouse(project: Project, batch: str) -> str:
    """Say what readers see after *batch* did not complete: what failed may have come after the publishing."""
    from phasewise.staging.batch import list_batches

    if any(known.id == batch and known.is_published for known in list_batches(project)):
        return "Its tables were published before that: readers see them."
    return "Nothing was published; readers still see the last good version."


@app.command
def demo_data() -> None:
    """Make the source database of the example project from the Lahman files, once."""
    project = load_project(find_project(Settings()))
    if not _make_demo_source(project):
        raise ProjectError(f"{project.root} is not the example project, so there is no demo data for it.")


def _open_project(settings: Settings) -> Project:
    project = load_project(find_project(settings))
    _make_demo_source(project)
    return project


def _make_demo_source(project: Project) -> bool:
    """Make the example's source when *project* reads it; return whether it does."""
    checkout = find_checkout()
    url = project.source.url
    if checkout is None or not url.startswith("sqlite:///"):
        return False
    target = (project.root / url.removeprefix("sqlite:///")).resolve()
    if target != checkout / "examples" / "baseball" / "data" / "lahman.sqlite":
        return False
    # The example's own code is of the checkout, and no part of the package.
    source = runpy.run_path(str(checkout / "examples" / "baseball" / "lahman.py"))["build_demo_source"](target)
    if source.was_built:
        text = f"Made the example database: {source.tables} tables, {source.rows:,} rows in {source.path}"
        print(text, file=sys.stderr)  # what deploy writes to standard output is fixed
    return True


@app.command
def query(
    sql: str,
    /,
    *,
    format: Annotated[Literal["table", "csv", "json"], Parameter(help="How to print the rows.")] = "table",  # noqa: A002
    at: Annotated[str | None, Parameter(help="Read it as this batch left it (see: phasewise snapshots).")] = None,
) -> None:
    """Query the published warehouse with SQL. Tables have their own names, marts are in the schema `marts`."""
    from phasewise.cli.console import render_rows
    from phasewise.lake.publications import query_warehouse

    settings = Settings()
    project = load_project(find_project(settings))
    columns, rows = query_warehouse(project, settings, sql, at=at)
    render_rows(columns, rows, format)


@app.command
def doctor() -> None:
    """Show which patches of Prefect are in force here: why, what each gains, for which versions."""
    from importlib.metadata import version

    from phasewise.patches.entries import list_patches, list_unknown_names
    from phasewise.patches.registry import NEWEST_TESTED

    patches = list_patches()
    patched = ("prefect", "fastapi", "jsonschema", "pydocket", "sqlalchemy")
    print(f"Versions: {', '.join(f'{name} {version(name)}' for name in patched)}.")
    print(f"Tested up to prefect {NEWEST_TESTED}.")
    print(f"Patches in force: {sum(reason is None for _, reason in patches)} of {len(patches)}.")
    if unknown := list_unknown_names():
        print(f"PHASEWISE_PATCHES names no patch that can be left out: {', '.join(unknown)}.")
    for patch, reason in patches:
        print(f"\n{patch.name} ({patch.process}): {'in force' if reason is None else f'not in force, {reason}'}")
        print(f"  Reason: {patch.why}")
        print(f"  Gain: {patch.gain}")
        print(f"  Since {patch.since}, until {patch.until}{f' ({patch.upstream})' if patch.upstream else ''}.")


add_warehouse_commands(app)
add_batch_commands(app, lambda: _reach_server(), lambda settings, batch: run_main(settings, batch))


def check_server_answers() -> str:
    """Return the API URL when the server answers within 3 seconds; needs no import of Prefect, so it is quick.

    Raises:
        ServerUnreachable: it does not.
    """
    url = os.environ["PREFECT_API_URL"]
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=3.0).raise_for_status()
    except httpx.HTTPError as exc:
        raise ServerUnreachable(
            f"No Prefect server answers at {url} ({type(exc).__name__}).",
            hint="Start one: make up (or set PREFECT_API_URL to the one you use).",
        ) from exc
    return url


def choose_server() -> Settings:
    """Decide which server this process talks to, before Prefect is imported and reads it; return the settings."""
    settings = Settings()
    if "PREFECT_API_URL" not in os.environ:
        from phasewise.stack.control import find_stack

        stack = find_stack(find_home(settings))
        _use_server(settings, stack.api_url if stack else DEFAULT_API_URL)
    return settings


def _reach_server() -> Settings:
    settings = choose_server()
    check_server_answers()
    return settings


def _use_server(settings: Settings, api_url: str) -> None:
    os.environ["PREFECT_API_URL"] = api_url
    # As in the stack's own processes: nothing calls home.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    _keep_home_clean(settings)


def _keep_home_clean(settings: Settings) -> None:
    if not (Path.home() / ".prefect").exists():
        # Someone without a Prefect profile of his own should not get one by trying this.
        os.environ.setdefault("PREFECT_HOME", str(find_home(settings) / "prefect"))


def _pool_name() -> str:
    return os.environ.get("PREFECT_WORK_POOL", "default-pool")
