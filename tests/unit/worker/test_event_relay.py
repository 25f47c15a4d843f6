from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from prefect.events import Event, Resource
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import set_api_log_sink

from phasewise.worker import event_outlet, event_relay
from phasewise.worker.event_outlet import Outlet, emit_api_log
from phasewise.worker.event_relay import Inlet, Intake

Connect = Callable[[socket.socket], Outlet]


class Client:
    """Takes logs as Prefect's client does; fails as often as it is told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.batches: list[list[dict[str, Any]]] = []

    async def create_logs(self, logs: list[dict[str, Any]]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        await asyncio.sleep(0.01)
        self.batches.append(logs)

    @property
    def messages(self) -> list[str]:
        return [log["message"] for batch in self.batches for log in batch]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(event_relay, "_GATHER_SECONDS", 0.01)
    yield
    EventsWorker.set_client_override(None)
    set_api_log_sink(None)


def log(message: str) -> dict[str, Any]:
    return {"message": message, "__payload_size__": 100}


@pytest.fixture
def outlet_to() -> Iterator[Callable[[socket.socket], Outlet]]:
    with contextlib.ExitStack() as stack:

        def install(theirs: socket.socket) -> Outlet:
            stack.enter_context(theirs)
            outlet = Outlet(os.dup(theirs.fileno()))
            stack.enter_context(outlet._socket)
            outlet.install()
            return outlet

        yield install


async def test_logs_of_a_run_reach_the_server_in_order_and_together(outlet_to: Connect) -> None:
    client = Client()
    ours, theirs = socket.socketpair()
    async with Intake(client) as intake:  # type: ignore[arg-type]
        inlet = Inlet(ours, intake)
        outlet_to(theirs)
        for number in range(50):
            emit_api_log(log(str(number)))
        inlet.close()

    assert client.messages == [str(number) for number in range(50)]
    assert len(client.batches) == 1
    assert "__payload_size__" not in client.batches[0][0]


async def test_what_a_killed_run_wrote_is_read_after_its_end() -> None:
    client = Client()
    ours, theirs = socket.socketpair()
    async with Intake(client) as intake:  # type: ignore[arg-type]
        inlet = Inlet(ours, intake)
        theirs.sendall(b'{"log": {"message": "last words"}}\n{"log": {"mess')
        theirs.close()
        inlet.close()

    assert client.messages == ["last words"]


async def test_a_process_that_holds_the_socket_open_does_not_keep_the_end_waiting() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with Intake(Client()) as intake:  # type: ignore[arg-type]
            inlet = Inlet(ours, intake)
            theirs.sendall(b'{"note": "begun"}\n')
            inlet.close()

    assert inlet.notes == {"begun"}


async def test_events_of_a_run_are_sent_by_its_worker(monkeypatch: pytest.MonkeyPatch, outlet_to: Connect) -> None:
    sent: list[Event] = []
    sender = type("Sender", (), {"send": lambda _, event: sent.append(event)})()
    monkeypatch.setattr(EventsWorker, "instance", classmethod(lambda cls: sender))
    event = Event(event="demo.happened", resource=Resource({"prefect.resource.id": "demo.1"}))
    ours, theirs = socket.socketpair()
    async with Intake(Client()) as intake:  # type: ignore[arg-type]
        inlet = Inlet(ours, intake)
        outlet_to(theirs).put(("event", event))
        inlet.close()

    assert sent == [event]


async def test_logs_wait_for_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_relay, "_AWAY_SECONDS", 0.01)
    client = Client(httpx.ConnectError("refused"), httpx.ReadError("cut"))
    async with Intake(client) as intake:  # type: ignore[arg-type]
        intake.take({"log": log("first")})
        intake.take({"log": log("second")})

    assert client.messages == ["first", "second"]


async def test_a_worker_that_is_cancelled_sends_the_last_logs() -> None:
    client = Client()
    with anyio.CancelScope() as scope:
        async with Intake(client) as intake:  # type: ignore[arg-type]
            intake.take({"log": log("last")})
            scope.cancel()

    assert client.messages == ["last"]


async def test_logs_that_the_server_refuses_do_not_keep_the_others_waiting() -> None:
    client = Client(ValueError("too large"))
    async with Intake(client) as intake:  # type: ignore[arg-type]
        intake.take({"log": log("refused")})
        while client.failures:
            await asyncio.sleep(0.005)
        intake.take({"log": log("taken")})

    assert client.messages == ["taken"]


def test_a_run_whose_worker_is_gone_sends_for_itself(monkeypatch: pytest.MonkeyPatch, outlet_to: Connect) -> None:
    own: list[dict[str, Any]] = []
    ours, theirs = socket.socketpair()
    outlet = outlet_to(theirs)
    ours.close()
    monkeypatch.setattr(event_outlet, "emit_api_log", own.append)

    outlet._put_log(log("alone"))

    assert own == [log("alone")]
    assert EventsWorker._client_override is None


def test_a_process_that_the_flow_forked_does_not_write_between_the_lines_of_its_run(outlet_to: Connect) -> None:
    ours, theirs = socket.socketpair()
    outlet = outlet_to(theirs)
    with ours:
        pid = os.fork()
        if pid == 0:
            outlet.note("from the child")
            os._exit(0)
        os.waitpid(pid, 0)
        outlet.note("from the run")

        assert ours.recv(1000) == b'{"note": "from the run"}\n'
