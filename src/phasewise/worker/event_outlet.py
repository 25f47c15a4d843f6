"""The run's end of the line to its worker: events, logs and notes. Runs in the process forked for a flow run.

The other end, and what it is good for, is in ``event_relay``.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

from prefect.events import Event
from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient
from prefect.logging.handlers import emit_api_log, set_api_log_sink

#: Seconds that a run waits for its worker to read before it sends for itself.
_STUCK_SECONDS = 5


class Outlet:
    """Where a flow run hands its events and logs over: *descriptor* is its end of the socket to the worker."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        # Not settimeout: that would make the reading of the same socket time out too.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _STUCK_SECONDS, 0))
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._is_open = True

    def install(self) -> None:
        """Let everything that this process would send go this way."""
        EventsWorker.set_client_override(ProcessPoolForwardingEventsClient, event_queue=self)
        set_api_log_sink(self._put_log)

    def put(self, item: tuple[str, Event]) -> None:
        """Hand an event over; Prefect's forwarding client takes this for a queue."""
        if not self._write({"event": item[1].model_dump(mode="json")}):
            EventsWorker.instance().send(item[1])

    def _put_log(self, log: dict[str, Any]) -> None:
        if not self._write({"log": log}):
            emit_api_log(log)

    def note(self, what: str) -> None:
        """Tell the worker something about this run."""
        self._write({"note": what})

    def _write(self, message: dict[str, Any]) -> bool:
        """Write one line; False when the worker does not take it, and from then on nothing goes this way."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            # A process that the flow forked shares the socket, but not the lock: lines would mix.
            if self._is_open and os.getpid() == self._pid:
                with suppress(OSError):
                    self._socket.sendall(line)
                    return True
            self._close()
            return False

    def _close(self) -> None:
        self._is_open = False
        EventsWorker.set_client_override(None)
        set_api_log_sink(None)
        if os.getpid() == self._pid:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
