"""The forkserver that runs are forked from, and when it is replaced by a new one. Runs where the client does.

A new one is started when the code that it imported changed, when another version of a deployment comes, after a
number of runs, on request (SIGHUP), and when it died. Runs that the old one has forked finish under it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import anyio

from phasewise.forkserver.client import ForkedProcess, Forkserver
from phasewise.forkserver.protocol import ForkRefused, ForkserverDied


class ForkserverPool:
    """The forkserver that runs are forked from now, and older ones that still have runs to finish."""

    def __init__(
        self,
        preload: Sequence[str],
        setup: Sequence[str],
        *,
        env: Mapping[str, str],
        max_runs: int | None = None,
        logger: logging.Logger | logging.LoggerAdapter[logging.Logger] | None = None,
    ) -> None:
        self._preload = preload
        self._setup = setup
        self._max_runs = max_runs
        self._logger = logger or logging.getLogger(__name__)
        self._starting = asyncio.Lock()
        self._current: Forkserver | None = None
        self._retired: set[Forkserver] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._replacing: Forkserver | None = None
        #: The environment that forkservers start with.
        self.env = dict(env)

    async def __aenter__(self) -> ForkserverPool:
        # Its imports take a second: let the worker register meanwhile, or the batch read its tables.
        self._in_background(self.current())
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            for task in self._background:
                task.cancel()
            if self._background:
                await asyncio.wait(self._background)
            for server in [self._current, *self._retired]:
                if server is not None:
                    await server.aclose()

    def _in_background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever needs it tries again

    async def current(self) -> Forkserver:
        """Return a forkserver that is alive, starting one if need be.

        Raises:
            ForkserverDied: it does not start.
        """
        async with self._starting:
            if self._current is None or not self._current.is_alive:
                self._current = await self._start()
            return self._current

    async def _start(self) -> Forkserver:
        server = await Forkserver.start(preload=self._preload, setup=self._setup, env=self.env)
        for problem in server.problems:
            self._logger.warning("The forkserver could not prepare %s", problem)
        return server

    async def fork(self, target: str, arguments: dict[str, Any], **where: Any) -> ForkedProcess:
        """Fork as ``Forkserver.fork`` does, replacing the forkserver when the code that it imported has changed.

        Raises:
            ForkserverDied, ForkRefused: also with a new one.
        """
        server = await self.current()
        try:
            process = await server.fork(target, arguments, **where)
        except (ForkRefused, ForkserverDied) as exc:
            if isinstance(exc, ForkRefused) and not exc.stale:
                raise
            self._retire(server, str(exc))
            server = await self.current()
            return await server.fork(target, arguments, **where)
        if self._max_runs is not None and server.forks >= self._max_runs and server is not self._replacing:
            self._replacing = server
            self._in_background(self._replace_when_ready(server))
        return process

    def guard(self, pid: int) -> Callable[[], None]:
        """Have a process that the worker has started killed when the worker is; call what is returned at its end.

        Where the forkserver does not start nobody guards it, as with Prefect's own worker.
        """
        ended = asyncio.Event()
        self._in_background(self._guard(pid, ended))
        return ended.set

    async def _guard(self, pid: int, ended: asyncio.Event) -> None:
        server = await self.current()
        if not ended.is_set():
            await server.guard(pid)
            await ended.wait()
            await server.release(pid)

    def replace(self, reason: str) -> None:
        """Fork what comes from now on from a new forkserver."""
        if self._current is not None:
            self._retire(self._current, reason)

    async def _replace_when_ready(self, old: Forkserver) -> None:
        """Replace *old* without letting a run wait for the imports of the new one."""
        new = await self._start()
        if self._current is old:
            self._retire(old, f"it has served {old.forks} runs.")
            self._current = new
        else:
            await new.aclose()

    def _retire(self, server: Forkserver, reason: str) -> None:
        if self._current is server:
            self._logger.info("Replacing the forkserver: %s", reason)
            self._current = None
            self._retired.add(server)
            self._in_background(self._close_when_idle(server))

    async def _close_when_idle(self, server: Forkserver) -> None:
        await server.wait_until_idle()
        await server.aclose()
        self._retired.discard(server)
