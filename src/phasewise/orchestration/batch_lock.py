"""One batch of a project at a time: among the batches on the server, and on the disk that holds its staging.

The server knows the batches of all machines, but none that run without it. A lock in the staging folder knows those.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort, Pause
from prefect.states import Cancelled, Scheduled
from prefect.types import KeyValueLabels

from phasewise.errors import BatchRunning
from phasewise.orchestration.batches import PROCESS_LABEL, PROJECT_LABEL, read_main_runs

#: Name of the state of a batch that has given its slot back until the one before it has ended.
AWAITING_BATCH = "AwaitingBatch"
#: Seconds until such a batch asks again. Workers claim a run up to 10 s before it is due: from then on it has a slot.
_POSTPONE_SECONDS = 20.0
#: Seconds between two looks whether the batch before has ended, where waiting costs no slot.
_WAIT_SECONDS = 1.0
#: Seconds in which a run that began says which project it is of, and between two looks whether it has.
_LABEL_SECONDS = 10.0
_LOOK_SECONDS = 0.2
#: Seconds between two looks whether a run that no worker watches was cancelled.
_WATCH_SECONDS = 0.5

OnOverlap = Literal["refuse", "wait"]


@asynccontextmanager
async def claiming_project(
    run: FlowRun, project: Path, staging: Path, *, on_overlap: OnOverlap = "refuse"
) -> AsyncIterator[None]:
    """Make the flow run *run* the one batch of *project* while the block runs.

    With ``on_overlap="wait"`` it waits for the batch before: in this process, or, where it has a slot of a queue, by
    leaving it to be scheduled again. The batch before may need just that slot.

    Raises:
        BatchRunning: another batch of the project is running; it is named.
        Pause: the run is scheduled again, and this process must end.
    """
    async with AsyncExitStack() as held:
        while True:
            try:
                await claim_batch(str(run.id), project)
                await held.enter_async_context(hold_project(staging, str(run.id)))
                break
            except BatchRunning as exc:
                if on_overlap == "refuse":
                    raise
                if run.deployment_id is not None:
                    await _postpone(run, exc.message)
                await asyncio.sleep(_WAIT_SECONDS)
        yield


async def _postpone(run: FlowRun, reason: str) -> None:
    due = datetime.now(UTC) + timedelta(seconds=_POSTPONE_SECONDS)
    state: State[None] = Scheduled(name=AWAITING_BATCH, scheduled_time=due, message=f"Waiting for its turn. {reason}")
    async with get_client() as client:
        await client.set_flow_run_state(run.id, state, force=True)
    raise Pause(state.message, state=state)


# ── on the server ─────────────────────────────────────────────────────────────────────────────────────────────────


async def claim_batch(run_id: str, project: Path) -> None:
    """Make *run_id* the one batch of *project* on the server.

    Two that start at the same moment see each other: the one that began to run first continues. The other waits until
    that one has said which project it is of.

    Raises:
        BatchRunning: another batch of the project is running; it is named.
    """
    async with get_client() as client:
        labels: KeyValueLabels = {PROJECT_LABEL: str(project), PROCESS_LABEL: identify_process(os.getpid())}
        await client.update_flow_run_labels(UUID(run_id), labels)
        patience = time.monotonic() + _LABEL_SECONDS
        while True:
            earlier = await _find_earlier(client, run_id)
            for rival in earlier:
                if rival.labels.get(PROJECT_LABEL) == str(project):
                    raise _explain_rival(rival)
            # One that began this instant has not said yet which project it is of.
            if all(PROJECT_LABEL in run.labels for run in earlier) or time.monotonic() > patience:
                return
            await asyncio.sleep(_LOOK_SECONDS)


async def _find_earlier(client: PrefectClient, run_id: str) -> list[FlowRun]:
    """Return the main_etl runs, of whatever project, that began to run before *run_id*, or are being cancelled."""
    runs = await read_main_runs(client, [StateType.RUNNING, StateType.CANCELLING])
    own = next((run for run in runs if str(run.id) == run_id), None)
    since = _running_since(own) if own else (datetime.max.replace(tzinfo=UTC), run_id)
    # For one that is being cancelled the time is that of its cancelling; what it began runs on until that is through.
    return [run for run in runs if run is not own and (_running_since(run) < since or _is_cancelling(run))]


def _is_cancelling(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_cancelling()


def _running_since(run: FlowRun) -> tuple[datetime, str]:
    # The state's time and not the run's start: a batch that is resumed began long ago, but runs only since now.
    return (run.state.timestamp if run.state else datetime.max.replace(tzinfo=UTC), str(run.id))


def _explain_rival(rival: FlowRun) -> BatchRunning:
    since = _running_since(rival)[0]
    return BatchRunning(
        f"Batch {rival.id} of this project has been running since {since:%Y-%m-%d %H:%M:%S} UTC.",
        hint=f'Wait for it, or cancel it: phasewise cancel {rival.id} (or set on_overlap = "wait" in phasewise.toml).',
    )


# ── on the disk ───────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def hold_project(staging: Path, batch: str, *, on_overlap: OnOverlap = "refuse") -> AsyncIterator[None]:
    """Be the one batch in *staging* while the block runs; the lock ends with this process, however it ends.

    Raises:
        BatchRunning: another one is running; it is named.
    """
    with _open_lock(staging) as file:
        while not _try_lock(file):
            if on_overlap == "refuse":
                file.seek(0)
                raise BatchRunning(
                    f"Batch {file.read() or '(just starting)'} of this project is running on this machine.",
                    hint="Wait for it, or end it: phasewise cancel, or Ctrl-C where it was started with --local "
                    '(or set on_overlap = "wait" in phasewise.toml).',
                )
            await asyncio.sleep(_WAIT_SECONDS)
        with _naming(file, batch):
            yield


def _open_lock(staging: Path) -> IO[str]:
    staging.mkdir(parents=True, exist_ok=True)
    return (staging / ".running-batch").open("a+", encoding="utf-8")


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _naming(file: IO[str], batch: str) -> Iterator[None]:
    file.truncate(0)
    file.write(batch)
    file.flush()
    yield
    file.truncate(0)


# ── the process of a batch ────────────────────────────────────────────────────────────────────────────────────────


def identify_process(pid: int) -> str:
    """Return ``host/pid/start``: *start* tells the process from a later one with the same number."""
    return f"{socket.gethostname()}/{pid}/{_read_start(pid)}"


def is_process_gone(identity: str) -> bool:
    """Tell whether the process that ``identify_process`` named has ended; False where that cannot be known here."""
    host, _, rest = identity.partition("/")
    pid, _, start = rest.partition("/")
    return host == socket.gethostname() and start.isdigit() and pid.isdigit() and _read_start(int(pid)) != start


def _read_start(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty when there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


@asynccontextmanager
async def ending_when_cancelled(run: FlowRun) -> AsyncIterator[None]:
    """End the block when *run* is cancelled, where no worker does that: in a process of the user's own.

    Raises:
        Abort: the run was cancelled; everything that the block had to clean up has been.
    """
    if run.deployment_id is not None:
        yield
        return
    task = asyncio.current_task()
    assert task is not None
    watcher = asyncio.create_task(_wait_until_cancelled(run.id))
    watcher.add_done_callback(lambda done: done.cancelled() or task.cancel())
    try:
        yield
    except asyncio.CancelledError:
        if not watcher.done():
            raise
        task.uncancel()
        async with get_client() as client:
            await client.set_flow_run_state(run.id, Cancelled(message="Cancelled."), force=True)
        raise Abort(f"Batch {run.id} was cancelled.") from None
    finally:
        watcher.cancel()


async def _wait_until_cancelled(run_id: UUID) -> None:
    async with get_client() as client:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            with suppress(httpx.HTTPError):  # a server that is away cancels nothing
                state = (await client.read_flow_run(run_id)).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    return
