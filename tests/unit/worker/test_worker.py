from __future__ import annotations

import asyncio
import contextlib
import pickle
import re
import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import anyio
import pytest
from packaging.specifiers import SpecifierSet
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from phasewise.worker import worker
from phasewise.worker.child import _Lazily
from phasewise.worker.warm_up import _SharedContexts
from phasewise.worker.worker import WarmProcessWorker


def test_the_range_of_prefect_is_the_same_wherever_it_is_named() -> None:
    root = Path(__file__).resolve().parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    [wanted] = [one.removeprefix("prefect") for one in project["dependencies"] if one.startswith("prefect")]
    tested = re.search(r"^PREFECT_RANGE := (.+)$", (root / "Makefile").read_text(), re.MULTILINE)[1].split()

    assert wanted.startswith(f">={tested[0]},<")
    assert all(SpecifierSet(wanted).contains(one) for one in tested)
    assert version("prefect") in tested
    assert f"for Prefect ``{wanted}``" in (worker.__doc__ or "")
    assert f"(``make test-prefect-range``: {' and '.join(tested)})" in (worker.__doc__ or "")


def test_the_worker_is_one_of_prefects_types() -> None:
    from prefect.workers.base import BaseWorker

    assert BaseWorker.get_worker_class_from_type("warm-process") is WarmProcessWorker
    assert "working_dir" in WarmProcessWorker.get_default_base_job_template()["variables"]["properties"]


def test_a_context_for_tls_is_made_once_for_the_same_arguments() -> None:
    import ssl

    shared = _SharedContexts("ssl")

    assert shared.create_default_context() is shared.create_default_context()
    assert shared.SSLContext is ssl.SSLContext
    assert shared.CERT_NONE == ssl.CERT_NONE


async def test_a_freed_slot_is_asked_for_again_while_runs_hold_the_slots_of_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = WarmProcessWorker(work_pool_name="pool")
    asked: list[None] = []
    monkeypatch.setattr(one._questions._wanted, "set", lambda: asked.append(None))

    one._submitting_flow_run_ids.add(uuid4())
    await one._submit_scheduled_flow_runs([])  # the limit is reached, so nothing more is handed out
    one._questions.slot_is_free(has_runs=False)

    assert len(asked) == 1


async def test_a_run_that_began_before_its_process_was_noted_is_cancelled_as_soon_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = WarmProcessWorker(work_pool_name="pool")
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=Cancelling(), start_time=datetime.now(UTC))
    processes: set[UUID] = set()
    cancelled: list[UUID] = []
    executors = SimpleNamespace(is_running=processes.__contains__, cancel_soon=cancelled.append)
    monkeypatch.setattr(one, "_executors", executors, raising=False)
    monkeypatch.setattr(one, "_client", SimpleNamespace(read_flow_run=AsyncMock(return_value=run)))
    monkeypatch.setattr(one, "get_flow_run_logger", lambda _: None)
    one._submitting_flow_run_ids.add(run.id)

    async with anyio.create_task_group() as one._services:
        one._cancel_soon(run.id)
        await anyio.sleep(0.1)
        processes.add(run.id)
        one._submitting_flow_run_ids.remove(run.id)

    assert cancelled == [run.id]


def test_what_a_run_does_not_use_of_its_file_is_not_made() -> None:
    made: list[str] = []

    def make(name: str, *, size: int) -> SimpleNamespace:
        made.append(name)
        return SimpleNamespace(name=name, size=size)

    used, unused = (_Lazily(make, name, size=3) for name in ("used", "unused"))
    assert (used.name, used.size) == ("used", 3)
    assert made == ["used"]
    assert pickle.loads(pickle.dumps(unused)) == SimpleNamespace(name="unused", size=3)  # noqa: S301
    assert made == ["used", "unused"]


async def test_an_idle_worker_does_not_ask_after_every_run_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one = WarmProcessWorker(work_pool_name="pool")
    asked: list[None] = []
    monkeypatch.setattr(one._questions._wanted, "set", lambda: asked.append(None))

    await one._submit_scheduled_flow_runs([])
    one._questions.slot_is_free(has_runs=False)

    assert asked == []


async def test_after_each_reconnect_a_worker_asks_for_what_it_may_have_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = WarmProcessWorker(work_pool_name="pool")
    connections: list[str] = []
    asked: list[int] = []
    monkeypatch.setattr(one._questions._wanted, "set", lambda: asked.append(len(connections)))
    monkeypatch.setattr(worker.anyio, "sleep", lambda _: asyncio.sleep(0))

    @contextlib.asynccontextmanager
    async def subscribe(**_: object) -> AsyncIterator[AsyncIterator[object]]:
        connections.append("one more")
        if len(connections) == 2:
            raise ConnectionError("the server is away")
        yield no_events()

    async def no_events() -> AsyncIterator[object]:
        if len(connections) == 3:
            await asyncio.Event().wait()
        raise ConnectionError("the socket was lost")
        yield

    monkeypatch.setattr(worker, "get_events_subscriber", subscribe)
    listening = asyncio.create_task(one._listen(uuid4()))
    async with asyncio.timeout(10):
        while len(asked) < 2:
            await asyncio.sleep(0)
    listening.cancel()

    assert asked == [1, 3]
