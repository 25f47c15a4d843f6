"""The worker's end of what flow runs hand over: their events and logs. Runs in the worker's process.

By itself each flow run opens a websocket for its events and a connection for its logs, and closes them a moment later:
a handshake, two clients and several requests a run. Here it writes both into a socket that its worker reads, and the
worker sends what comes from all its runs over connections that are open already, many at a time. It goes through
Prefect's own hooks for processes that forward to another (those of its process-pool task runner).

What a run wrote is in the kernel's hands at once, so a run that is killed loses less than one that keeps it in a queue
of its own: the worker reads the rest after the process has ended. If the worker cannot be written to,
the run sends for itself.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

import anyio
import httpx
from prefect.client.orchestration import PrefectClient
from prefect.events import Event
from prefect.events.worker import EventsWorker
from prefect.logging import get_logger
from prefect.settings import get_current_settings

#: Seconds in which logs of all runs are gathered into one request.
_GATHER_SECONDS = 0.5
#: Seconds between two tries at a server that is away.
_AWAY_SECONDS = 1.0
#: Seconds that a worker that ends gives the last logs.
_LAST_SECONDS = 5.0
_CHUNK_BYTES = 1 << 16
#: What a log handler notes next to a log for whoever batches it; no field of the log.
_SIZE = "__payload_size__"


class Inlet:
    """The worker's end of the socket to one flow run."""

    def __init__(self, channel: socket.socket, intake: Intake) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._intake = intake
        #: What the run has told its worker.
        self.notes: set[str] = set()
        self._buffer = b""
        asyncio.get_running_loop().add_reader(channel, self._read)

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._channel.send(data)

    def close(self) -> None:
        """Read what is left of a process that has ended."""
        asyncio.get_running_loop().remove_reader(self._channel)
        # Not until the end of the file: a process that the flow has left behind may hold the other end open.
        while self._read():
            pass
        self._channel.close()

    def _read(self) -> bool:
        try:
            chunk = self._channel.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._channel)
            return False
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if "note" in message:
                self.notes.add(message["note"])
            else:
                self._intake.take(message)
        return True


class Intake:
    """Sends to the server what the runs of a worker hand over."""

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._logs: list[dict[str, Any]] = []
        self._has_logs = asyncio.Event()
        self._is_closing = False
        self._sending: asyncio.Task[None] | None = None
        self._logger = get_logger("phasewise.worker.event_relay")

    async def __aenter__(self) -> Intake:
        self._sending = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Send what is left; Prefect sends the last events when the process exits."""
        assert self._sending is not None
        self._is_closing = True
        self._has_logs.set()
        # A worker ends by a cancellation, which would end this wait at once.
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._sending], timeout=_LAST_SECONDS)
        self._sending.cancel()

    def take(self, message: dict[str, Any]) -> None:
        if log := message.get("log"):
            self._logs.append(log)
            self._has_logs.set()
        elif event := message.get("event"):
            EventsWorker.instance().send(Event.model_validate(event))

    async def _send(self) -> None:
        while not self._is_closing:
            await self._has_logs.wait()
            if not self._is_closing:
                await asyncio.sleep(_GATHER_SECONDS)
            self._has_logs.clear()
            await self._send_logs()
        await self._send_logs()  # also when it was closed before it came here

    async def _send_logs(self) -> None:
        while self._logs:
            count, body = _batch(self._logs)
            try:
                await self._client.create_logs(body)
            except httpx.TransportError:  # the server is away: it will be back
                await asyncio.sleep(_AWAY_SECONDS)
                continue
            except Exception as exc:  # noqa: BLE001 - it has refused them, and would again
                self._logger.warning("The server refused %d log lines: %s", count, exc)
            del self._logs[:count]


def _batch(logs: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """Return as many of *logs* as may go into one request, and how many those are."""
    limit = get_current_settings().logging.to_api.batch_size
    size = 0
    body: list[dict[str, Any]] = []
    for log in logs:
        size += log.get(_SIZE) or len(json.dumps(log))
        if body and size > limit:
            break
        body.append({key: value for key, value in log.items() if key != _SIZE})
    return len(body), body
