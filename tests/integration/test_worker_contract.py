"""The same flow runs on Prefect's process worker and on ours: the API must show the same of both.

All cases run once, at the same time, on both workers; each test compares one of them. Where ours is better on purpose,
a test at the end says what each of them shows.
"""

from __future__ import annotations

import ast
import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, TaskRunFilter, TaskRunFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Suspended

from phasewise.stack.control import StackInfo
from tests.integration.conftest import Runs, create_python

pytestmark = pytest.mark.timeout(420)

#: What only one of the two writes, see docs/decisions/0066: a forked run executes no pull step, since its worker has
#: looked at it already, and one that is not forked says why; Prefect's worker warns that it cannot run the hooks of a
#: run that never started, and what its hooks log does not arrive.
DIFFERS = re.compile(
    r"deployment pull step|deployment step|All deployment steps|pull-step\.executed|Runner failed to retrieve flow"
    r"|(Running h|H)ook 'note'|Starting a new Python for this run",
    re.IGNORECASE,
)
#: A process that dies takes along what it logged in the last two seconds; one of ours has handed it to its worker.
DIES = {"killed_with_hooks", "leaves_with_a_code"}
POOLS = {"process": "contract-process", "warm-process": "contract-warm"}
SECONDS = 150.0


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the API and the machine show of one flow run, without what differs from run to run."""

    states: list[str]
    message: str
    labels: dict[str, str]
    #: Name and related resources of each event of the run.
    events: list[str]
    logs: list[str]
    tasks: list[str]
    has_process: bool
    #: What the flow and its hooks wrote.
    written: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


Case = Callable[[Runs, Path], Awaitable[Shown]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@case
async def completed(runs: Runs, file: Path) -> Shown:
    return await show(runs, await finish(runs, "completed", value=5))


@case
async def with_tasks(runs: Runs, file: Path) -> Shown:
    return await show(runs, await finish(runs, "with_tasks"), tasks=3)


@case
async def failed(runs: Runs, file: Path) -> Shown:
    return await show(runs, await finish(runs, "failed"))


@case
async def killed_with_hooks(runs: Runs, file: Path) -> Shown:
    run = await finish(runs, "with_hooks", file=str(file), die=True)
    await until(lambda: bool(read(file)))
    await until(lambda: has_log(runs, run, "Check whether the flow run exceeded"))
    return await show(runs, run, file)


@case
async def leaves_with_a_code(runs: Runs, file: Path) -> Shown:
    run = await finish(runs, "leaves_with_a_code")
    await until(lambda: has_log(runs, run, "Check the flow run logs"))
    return await show(runs, run)


@case
async def cancelled_while_running(runs: Runs, file: Path) -> Shown:
    run = await start(runs, "Running", "with_hooks", file=str(file), die=False)
    # The state comes before the first log and the first heartbeat: what is cancelled in between shows none, on both.
    await until(lambda: has_log(runs, run, "Beginning flow run"))
    await until(lambda: has_event(runs, run, "heartbeat"))
    await runs.client.set_flow_run_state(run.id, Cancelling())
    run = await runs.until(run, seconds=SECONDS)
    await until(lambda: bool(read(file)))
    return await show(runs, run, file)


@case
async def cancelled_while_it_starts(runs: Runs, file: Path) -> Shown:
    run = await start(runs, "Submitting", "slow_to_start", entrypoint="slow_flow.py:slow_to_start", file=str(file))
    await until(lambda: has_pid(runs, run))
    await runs.client.set_flow_run_state(run.id, Cancelling())
    return await show(runs, await runs.until(run, seconds=SECONDS), file)


@case
async def suspended(runs: Runs, file: Path) -> Shown:
    run = await start(runs, "Running", "with_tasks_for_a_while")
    await until(lambda: has_pid(runs, run))
    process = (await runs.client.read_flow_run(run.id)).infrastructure_pid
    await runs.client.set_flow_run_state(run.id, Suspended(timeout_seconds=600))
    await until(lambda: not Path(f"/proc/{process}").exists())
    return await show(runs, await runs.until(run, "Suspended"), tasks=None)


@case
async def surroundings_of_the_job(runs: Runs, file: Path) -> Shown:
    job = {"env": {"COLOUR": "blue"}, "working_dir": str(file.parent)}
    run = await finish(runs, "surroundings", file=str(file), job_variables=job)
    found = ast.literal_eval(read(file))
    return await show(runs, run, extra={key: found[key] for key in ("cwd", "colour", "path")})


@case
async def a_command_with_another_interpreter(runs: Runs, file: Path) -> Shown:
    job = {"command": f"{create_python(file.parent / 'commanded')} -m prefect.engine"}
    run = await finish(runs, "surroundings", file=str(file), job_variables=job)
    return await show(runs, run, extra={"python": Path(ast.literal_eval(read(file))["python"]).name})


@case
async def another_interpreter_on_the_path(runs: Runs, file: Path) -> Shown:
    python = create_python(file.parent / "on_the_path")
    env = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(python.parents[1])}
    run = await finish(runs, "surroundings", file=str(file), job_variables={"env": env})
    return await show(runs, run, extra={"python": ast.literal_eval(read(file))["python"]})


# ── how a case is run and looked at ──────────────────────────────────────────────────────────────────────────────


async def start(runs: Runs, state: str, name: str, **parameters: Any) -> FlowRun:
    return await runs.until(await runs.start(name, **parameters), state, seconds=SECONDS)


async def finish(runs: Runs, name: str, **options: Any) -> FlowRun:
    return await runs.until(await runs.start(name, **options), seconds=SECONDS)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not (await found if asyncio.iscoroutine(found := condition()) else found):
            await asyncio.sleep(0.1)


async def has_log(runs: Runs, run: FlowRun, text: str) -> bool:
    return any(text in line for line in await read_logs(runs, run))


async def has_event(runs: Runs, run: FlowRun, name: str) -> bool:
    return any(event.startswith(f"prefect.flow-run.{name} of ") for event in await read_events(runs, run))


async def has_pid(runs: Runs, run: FlowRun) -> bool:
    return (await runs.client.read_flow_run(run.id)).infrastructure_pid is not None


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


async def show(
    runs: Runs, run: FlowRun, file: Path | None = None, *, tasks: int | None = 0, extra: dict[str, Any] | None = None
) -> Shown:
    """Look at *run* until what arrives later than its state (events, logs, *tasks*) has stopped coming."""
    seen: list[Any] = []
    # Logs are sent every two seconds.
    while len(seen) < 3 or not seen[-1] == seen[-2] == seen[-3]:
        await asyncio.sleep(2.5)
        seen.append((await read_logs(runs, run), await read_events(runs, run), await read_tasks(runs, run)))
    logs, events, task_states = seen[-1]
    run = await runs.client.read_flow_run(run.id)
    return Shown(
        states=await runs.states(run),
        message=plain((run.state and run.state.message) or "", run),
        labels={key: plain(str(value), run) for key, value in run.labels.items()},
        events=events,
        logs=[line for line in logs if tasks is not None or "task_runs" not in line],
        tasks=task_states if tasks is not None else [],
        has_process=run.infrastructure_pid is not None,
        written=read(file) if file else "",
        extra=extra or {},
    )


async def read_logs(runs: Runs, run: FlowRun) -> list[str]:
    logs = await runs.client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}))
    lines = (f"{log.name} {log.level} {plain(log.message, run)}" for log in logs)
    return sorted(line for line in lines if not DIFFERS.search(line))


async def read_events(runs: Runs, run: FlowRun) -> list[str]:
    wanted = {"filter": {"resource": {"id": [f"prefect.flow-run.{run.id}"]}}, "limit": 50}
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{runs.client.api_url}events/filter", json=wanted, timeout=30)
    return sorted(
        f"{event['event']} of " + ", ".join(sorted(one["prefect.resource.role"] for one in event["related"]))
        for event in answer.json()["events"]
        if not DIFFERS.search(event["event"])
    )


async def read_tasks(runs: Runs, run: FlowRun) -> list[str]:
    of_run = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run.id]))
    found = await runs.client.read_task_runs(task_run_filter=of_run)
    return sorted(f"{one.name.rpartition('-')[0]} {one.state_name} {one.run_count}" for one in found)


def plain(text: str, run: FlowRun) -> str:
    """Take out of *text* what names this run, this worker or this moment."""
    for name in (run.name, *POOLS.values(), "warm-process", "process"):
        text = text.replace(name, "…")
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "…", text)
    return re.sub(r"/tmp/[^\s'\"]+|\b\d{3,}\b", "…", text)  # noqa: S108


@contextmanager
def worker(
    kind: str, stack: StackInfo, log: Path, *, pool: str = "", name: str = "", before: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker of type *kind* which executes the statements *before* at first."""
    pool = pool or POOLS[kind]
    command = [sys.executable, "-c", f"{before}\nfrom phasewise.worker.__main__ import main; main()"]
    command += ["--pool", pool, "--name", name or pool, "--type", kind]
    environment = {
        **os.environ,
        "PREFECT_API_URL": stack.api_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    with log.open("wb") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


@dataclass(frozen=True, kw_only=True)
class Observed:
    shown: dict[tuple[str, str], Shown | BaseException]
    #: What each worker wrote to its standard output.
    output: dict[str, str]


@pytest.fixture(scope="module")
def observed(stack: StackInfo, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return observe(stack, tmp_path_factory.mktemp("contract"))


def observe(stack: StackInfo, folder: Path) -> Observed:
    logs = {kind: folder / f"{kind}.log" for kind in POOLS}
    for kind in POOLS:
        (folder / kind).mkdir()
    with worker("process", stack, logs["process"]), worker("warm-process", stack, logs["warm-process"]):
        shown = asyncio.run(run_all(stack, folder))
    return Observed(shown=shown, output={kind: log.read_text() for kind, log in logs.items()})


async def run_all(stack: StackInfo, folder: Path) -> dict[tuple[str, str], Shown | BaseException]:
    with temporary_settings({PREFECT_API_URL: stack.api_url}):
        async with get_client() as client:
            pools = {kind: Runs(client=client, pool=pool) for kind, pool in POOLS.items()}
            async with asyncio.timeout(60):
                while not {*POOLS.values()} <= {pool.name for pool in await client.read_work_pools()}:
                    await asyncio.sleep(0.2)
            keys = [(kind, name) for kind in POOLS for name in CASES]
            looks = [CASES[name](pools[kind], folder / kind / name) for kind, name in keys]
            found = await asyncio.gather(*looks, return_exceptions=True)
    return dict(zip(keys, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_api_shows_the_same_as_of_the_process_worker(observed: Observed, name: str) -> None:
    stock, warm = (observed.shown["process", name], observed.shown["warm-process", name])
    for found in (stock, warm):
        if isinstance(found, BaseException):
            raise found

    assert isinstance(warm, Shown)
    assert isinstance(stock, Shown)
    if name in DIES:
        assert Counter(stock.logs) <= Counter(warm.logs)
        warm = replace(warm, logs=stock.logs)
        # Whether the one heartbeat came out before the end is chance, on both.
        stock, warm = (
            replace(one, events=[x for x in one.events if ".heartbeat of " not in x]) for one in (stock, warm)
        )
    assert asdict(warm) == asdict(stock)


def test_a_run_beats_its_heart_on_both(observed: Observed) -> None:
    for kind in POOLS:
        shown = observed.shown[kind, "completed"]
        assert isinstance(shown, Shown)
        assert [event for event in shown.events if event.startswith("prefect.flow-run.heartbeat of ")] != []


def test_what_a_run_prints_is_streamed_to_the_output_of_its_worker(observed: Observed) -> None:
    for output in observed.output.values():
        assert "said on stdout" in output
        assert "said on stderr" in output


# ── where ours is better on purpose ──────────────────────────────────────────────────────────────────────────────

#: A worker that is killed when it has claimed a run and put its name to it, before it starts a process.
KILLED_WITH_A_CLAIM = """
import os, signal
from prefect.workers.base import BaseWorker

async def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

BaseWorker._propose_submitting_state = die
"""


async def test_a_run_that_is_pending_without_a_process_stays_so_on_the_process_worker_and_runs_on_ours(
    runs: Runs, stack: StackInfo, tmp_path: Path
) -> None:
    found: dict[str, tuple[Runs, FlowRun]] = {}
    for kind in POOLS:
        pool = Runs(client=runs.client, pool=f"claimed-{kind}")
        log = tmp_path / f"first-{kind}.log"
        with worker(kind, stack, log, pool=pool.pool, name="first", before=KILLED_WITH_A_CLAIM) as first:
            await until(lambda pool=pool: has_pool(pool))
            found[kind] = pool, await start(pool, "Pending", "completed")
            await until(lambda first=first: first.poll() is not None)
        assert first.returncode == -signal.SIGKILL
    stock, left = found["process"]
    ours, again = found["warm-process"]

    with (
        worker("process", stack, tmp_path / "second-process.log", pool=stock.pool, name="second"),
        worker("warm-process", stack, tmp_path / "second-warm.log", pool=ours.pool, name="second"),
    ):
        await ours.until(again, seconds=SECONDS)
        # Another worker of the pool is there, and takes what is new.
        other = await finish(stock, "completed")

    states = {state.name: state for state in await runs.client.read_flow_run_states(again.id)}
    assert other.state is not None
    assert other.state.name == "Completed"
    assert await stock.states(left) == ["Scheduled", "Pending"]
    assert await ours.states(again) == [
        *["Scheduled", "Pending"],
        *["AwaitingRetry", "Pending", "Submitting", "Running", "Completed"],
    ]
    assert (states["AwaitingRetry"].message or "").startswith("Its worker first died: no heartbeat for ")


async def has_pool(runs: Runs) -> bool:
    return runs.pool in [pool.name for pool in await runs.client.read_work_pools()]
