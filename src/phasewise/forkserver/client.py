"""The handle on a forkserver and on the processes that it forks. Runs in the worker (or the local batch).

When the socket closes, however the worker died, the forkserver kills its children and what it guards, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phasewise.forkserver.protocol import LENGTH, ForkRefused, ForkserverDied, frames

#: Seconds after which a process that was told to end is told to look whether it was.
_NUDGE_SECONDS = 0.25


@dataclass(kw_only=True, eq=False)
class ForkedProcess:
    """A child of the forkserver, seen from the worker."""

    pid: int
    #: As in subprocess: None while it runs, negative for a signal.
    returncode: int | None = None
    #: Highest resident memory; 0 until it ended, and when it was lost.
    peak_rss_bytes: int = 0
    #: The forkserver died, and this process with it.
    is_lost: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> int:
        """Wait for the process to end; returns its returncode."""
        await self.ended.wait()
        assert self.returncode is not None
        return self.returncode

    async def wait_signalled(self) -> int:
        """Wait for a process to end that was sent SIGTERM, and see to it that its Python notices.

        It can miss that (see ``_notice_sigterm``), and would be killed without a chance to clean up.
        """
        while True:
            try:
                return await asyncio.wait_for(self.wait(), _NUDGE_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGURG)

    def _finish(self, returncode: int, peak_rss_bytes: int = 0) -> None:
        self.returncode = returncode
        self.peak_rss_bytes = peak_rss_bytes
        self.ended.set()


class Forkserver:
    """A running forkserver. Start it with ``await Forkserver.start(…)``, close it with ``await aclose()``.

    ``preload`` holds module names; one that cannot be imported is skipped and reported in ``problems``.
    ``setup`` holds callables as ``module:function``, run once, after the imports and before the first fork.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process = process
        self._channel = channel
        self._writer_lock = asyncio.Lock()
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._requests: dict[int, asyncio.Future[ForkedProcess]] = {}
        self._children: dict[int, ForkedProcess] = {}
        #: Process → set when it is guarded no longer.
        self._guarded: dict[int, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None
        #: One line for each module that could not be preloaded.
        self.problems: tuple[str, ...] = ()
        #: Number of processes forked so far.
        self.forks = 0

    @classmethod
    async def start(
        cls,
        *,
        preload: Sequence[str] = (),
        setup: Sequence[str] = (),
        env: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Forkserver:
        """Start a forkserver and wait until its imports are done.

        Raises:
            ForkserverDied: it ended, or was not ready within ``timeout`` seconds.
        """
        ours, theirs = socket.socketpair()
        prepared = json.dumps({"preload": list(preload), "setup": list(setup)})
        command = [sys.executable, "-m", "phasewise.forkserver.server", str(theirs.fileno()), prepared]
        with theirs:
            # A session of its own: Ctrl-C in the worker's terminal is for the worker to act on, not for flow runs.
            process = subprocess.Popen(  # noqa: ASYNC220 - returns as soon as the child has started
                command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        server = cls(process, ours)
        try:
            await server._listen(timeout)
        except BaseException:
            await server.aclose()
            raise
        return server

    async def _listen(self, timeout: float) -> None:
        self._channel.setblocking(False)
        self._task = asyncio.create_task(self._receive())
        try:
            ready = await asyncio.wait_for(asyncio.shield(self._ready), timeout)
        except TimeoutError:
            raise ForkserverDied(f"The forkserver was not ready within {timeout:g} seconds.") from None
        self.problems = tuple(ready["problems"])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def running(self) -> int:
        """Number of processes that were asked for and have not ended, and of those that are guarded."""
        return len(self._requests) + len(self._children) + len(self._guarded)

    async def wait_until_idle(self) -> None:
        """Wait until everything that was forked has ended, and nothing is guarded."""
        while self.running:
            if self._children:
                await next(iter(self._children.values())).wait()
            elif self._guarded:
                await next(iter(self._guarded.values())).wait()
            else:
                await asyncio.wait(self._requests.values())

    async def fork(
        self,
        target: str,
        arguments: dict[str, Any],
        *,
        env: dict[str, str],
        cwd: str,
        stdout: int = 1,
        stderr: int = 2,
        descriptor: int | None = None,
    ) -> ForkedProcess:
        """Fork a process that calls *target* (``module:function``) with *arguments* and exits with what it returns.

        ``env`` is the whole environment of the child; ``arguments`` must be JSON. One more open descriptor can be
        handed to the child: its number there comes as the argument ``descriptor``.

        Raises:
            ForkRefused: the forkserver is stale or no longer single-threaded.
            ForkserverDied: it ended before it answered.
        """
        if not self.is_alive:
            raise ForkserverDied("The forkserver has ended.")
        self.forks += 1
        number = self.forks
        answer: asyncio.Future[ForkedProcess] = asyncio.get_running_loop().create_future()
        self._requests[number] = answer
        fds = [stdout, stderr] if descriptor is None else [stdout, stderr, descriptor]
        frame = {"id": number, "target": target, "arguments": arguments, "env": env, "cwd": cwd, "fds": len(fds)}
        await self._tell(frame, fds)
        return await answer

    async def guard(self, pid: int) -> None:
        """Have the process *pid*, and all that it starts, killed when this worker ends before ``release``.

        Raises:
            ForkserverDied: nobody guards it.
        """
        if not self.is_alive:
            raise ForkserverDied("The forkserver has ended.")
        self._guarded[pid] = asyncio.Event()
        await self._tell({"guard": pid})

    async def release(self, pid: int) -> None:
        """Guard a process no longer, because it has ended."""
        if (released := self._guarded.pop(pid, None)) is not None:
            released.set()
            with contextlib.suppress(ForkserverDied):
                await self._tell({"release": pid})

    async def _tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            async with self._writer_lock:
                await self._send(json.dumps(message).encode(), list(fds))
        except OSError as exc:
            raise ForkserverDied("The forkserver has ended.") from exc

    async def _send(self, payload: bytes, fds: list[int]) -> None:
        data = memoryview(LENGTH.pack(len(payload)) + payload)
        pending = fds
        while data:
            try:
                sent = socket.send_fds(self._channel, [data], pending)
            except BlockingIOError:
                await _until_writable(self._channel)
                continue
            data, pending = data[sent:], []

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        try:
            while chunk := await loop.sock_recv(self._channel, 65536):
                buffer += chunk
                for message in frames(buffer):
                    self._handle(message)
        except OSError:
            pass  # a reset is an end like any other
        finally:
            self._lose_everything()

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ready":
            self._ready.set_result(message)
        elif kind == "forked":
            process = self._children[message["pid"]] = ForkedProcess(pid=message["pid"])
            if not (answer := self._requests.pop(message["id"])).done():
                answer.set_result(process)
        elif kind == "refused":
            if not (answer := self._requests.pop(message["id"])).done():
                answer.set_exception(ForkRefused(message["reason"], stale=message["stale"]))
        elif kind == "exited" and (ended := self._children.pop(message["pid"], None)):
            ended._finish(os.waitstatus_to_exitcode(message["status"]), message["peak_rss_kib"] * 1024)

    def _lose_everything(self) -> None:
        died = ForkserverDied("The forkserver has ended.", hint="Its reason is in the worker's log.")
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._requests.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(died)
                answer.exception()  # retrieved: whoever waits still gets it, nobody waiting is no warning
        for process in self._children.values():
            process.is_lost = True
            process._finish(-signal.SIGKILL)
        for released in self._guarded.values():
            released.set()
        self._requests.clear()
        self._children.clear()
        self._guarded.clear()

    async def aclose(self) -> None:
        """End the forkserver and, by SIGKILL, whatever it has still running."""
        if self._task is not None:
            # Before the socket is closed: the loop must forget a descriptor before its number is used again.
            self._task.cancel()
            await asyncio.wait([self._task])
        self._channel.close()
        try:
            await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)


async def _until_writable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    loop.add_writer(channel, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(channel)
