"""The warm process that flow runs are forked from, and the handle that a worker holds on it.

Starting Python and importing Prefect costs a second or more of CPU for each flow run. The forkserver pays that once:
a single-threaded process imports everything that a flow run needs, then forks a child for every run. A worker cannot
fork itself, because it runs an event loop and threads, and a fork copies only the thread that called it.

The worker and the forkserver talk over one Unix socket, in frames: four bytes of length, then JSON.

    worker      → forkserver   fork: target, arguments, env, cwd, and the descriptors for stdout and stderr
    worker      → forkserver   guard | release: a process that the worker itself has started
    forkserver  → worker       ready | forked | refused | exited

When the socket closes, however the worker died, the forkserver kills its children and what it guards, and ends. When
the forkserver dies, the kernel kills its children (Linux). So nothing that was forked outlives the worker.

This module imports the standard library and ``phasewise.errors`` alone: what is preloaded is named by the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from phasewise.errors import OrchestrationError

_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG = 1
#: Seconds after which a process that was told to end is told to look whether it was.
_NUDGE_SECONDS = 0.25


class ForkserverDied(OrchestrationError):
    """The forkserver ended or never became ready; what it had forked was killed with it."""


class ForkRefused(OrchestrationError):
    """The forkserver will not fork this run, for the reason in the message.

    ``stale`` is true when a file that it had imported has changed since: a new forkserver would serve the run.
    """

    def __init__(self, reason: str, *, stale: bool = False) -> None:
        self.stale = stale
        super().__init__(reason)


def die_with_parent(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send *signum* to this process when its parent dies, even by kill -9 (Linux only).

    It follows the thread that forked, so the parent must fork from a thread that lives as long as itself.
    """
    if not sys.platform.startswith("linux"):
        return
    _libc().prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if os.getppid() != parent_pid:  # the parent died before the call: nobody will send the signal
        os.kill(os.getpid(), signum)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# ── the worker's side ────────────────────────────────────────────────────────────────────────────────────────────


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
        command = [sys.executable, "-m", "phasewise.forkserver", "--channel", str(theirs.fileno())]
        command += [f"--preload={name}" for name in preload] + [f"--setup={name}" for name in setup]
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
        try:
            async with self._writer_lock:
                await self._send(json.dumps(frame).encode(), fds)
        except OSError as exc:
            raise ForkserverDied("The forkserver has ended.") from exc
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

    async def _tell(self, message: dict[str, int]) -> None:
        try:
            async with self._writer_lock:
                await self._send(json.dumps(message).encode(), [])
        except OSError as exc:
            raise ForkserverDied("The forkserver has ended.") from exc

    async def _send(self, payload: bytes, fds: list[int]) -> None:
        data = memoryview(_LENGTH.pack(len(payload)) + payload)
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
                for message in _frames(buffer):
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
            answer = self._requests.pop(message["id"])
            if not answer.done():
                answer.set_result(process)
        elif kind == "refused":
            answer = self._requests.pop(message["id"])
            if not answer.done():
                answer.set_exception(ForkRefused(message["reason"], stale=message["stale"]))
        elif kind == "exited" and (ended := self._children.pop(message["pid"], None)):
            ended._finish(os.waitstatus_to_exitcode(message["status"]), message["peak_rss_kib"] * 1024)

    def _lose_everything(self) -> None:
        died = ForkserverDied("The forkserver has ended.", hint="Its reason stands in the worker's log.")
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


def _frames(buffer: bytearray) -> Iterator[dict[str, Any]]:
    """Yield the complete frames at the head of *buffer* and remove them from it."""
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        message = json.loads(bytes(buffer[_LENGTH.size : end]))
        del buffer[:end]
        yield message


# ── the forkserver's side ────────────────────────────────────────────────────────────────────────────────────────


class _Zygote:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._children: set[int] = set()
        #: Process → when it started: its number may be another's once it has ended.
        self._guarded: dict[int, str | None] = {}
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._watched: dict[str, tuple[int, int]] = {}
        self._wake_reader, self._wake_writer = socket.socketpair()

    def prepare(self, preload: Sequence[str], setup: Sequence[str]) -> None:
        problems = [problem for name in preload if (problem := _attempt(importlib.import_module, name))]
        problems += [problem for name in setup if (problem := _attempt(_call, name))]
        watched = [*_project_files(), *_installation()]
        self._watched = {path: stamp for path in watched if (stamp := _stamp(path))}
        # Everything imported so far lives as long as the process: keep the collector from writing to its
        # headers, which would copy those pages into every child.
        gc.collect()
        gc.freeze()
        self._send({"kind": "ready", "problems": problems})

    def serve(self) -> None:
        """Fork on request until the worker closes the socket; then kill what is left."""
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_reader in ready:
                    self._reap()
                if self._channel in ready and not self._read():
                    break
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if guarded := {pid for pid, started in self._guarded.items() if started and _started(pid) == started}:
            _kill_with_descendants(guarded)

    def _read(self) -> bool:
        try:
            data, received, _, _ = socket.recv_fds(self._channel, 65536, 64)
        except ConnectionError:
            return False
        self._buffer += data
        self._fds += received
        for request in _frames(self._buffer):
            if "guard" in request:
                self._guarded[request["guard"]] = _started(request["guard"])
                continue
            if "release" in request:
                self._guarded.pop(request["release"], None)
                continue
            count = request["fds"]
            fds, self._fds = self._fds[:count], self._fds[count:]
            self._answer(request, fds)
            for fd in fds:
                os.close(fd)
        return bool(data)

    def _answer(self, request: dict[str, Any], fds: list[int]) -> None:
        number = request["id"]
        if reason := self._stale():
            self._send({"kind": "refused", "id": number, "stale": True, "reason": reason})
        elif threading.active_count() != 1:
            names = ", ".join(thread.name for thread in threading.enumerate()[1:])
            reason = f"Something that was preloaded started a thread ({names})."
            self._send({"kind": "refused", "id": number, "stale": False, "reason": reason})
        else:
            try:
                pid = self._fork(request, fds)
            except OSError as exc:  # out of processes or memory: the worker decides what to do
                self._send({"kind": "refused", "id": number, "stale": False, "reason": f"fork failed: {exc}"})
            else:
                self._send({"kind": "forked", "id": number, "pid": pid})

    def _fork(self, request: dict[str, Any], fds: list[int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        # Here and not in the child: each page that a child writes to is copied, and these are hundreds.
        importlib.invalidate_caches()
        _libc()
        zygote = os.getpid()
        # Block signals until the child has handlers of its own: until then they would run the forkserver's.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become_child(request, fds, zygote)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        # On both sides of the fork, so that the group exists before the worker can signal it.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._children.add(pid)
        return pid

    def _become_child(self, request: dict[str, Any], fds: list[int], zygote: int) -> NoReturn:
        code = 1
        try:
            die_with_parent(zygote)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _notice_sigterm()
            for open_socket in (self._channel, self._wake_reader, self._wake_writer):
                open_socket.close()
            stdout, stderr, *descriptor = fds
            for target, fd in ((1, stdout), (2, stderr)):
                os.dup2(fd, target)
                os.close(fd)
            if descriptor:
                request["arguments"]["descriptor"] = descriptor[0]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
            _enter(request["env"], request["cwd"])
            code = _run(request["target"], request["arguments"])
        except BaseException:  # noqa: BLE001 - the last frame of the child: nothing may return into the forkserver
            traceback.print_exc()
        finally:
            _leave(code)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_reader.recv(4096):
                pass
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._children.discard(pid)
            self._send({"kind": "exited", "pid": pid, "status": status, "peak_rss_kib": usage.ru_maxrss})

    def _stale(self) -> str | None:
        for path, stamp in self._watched.items():
            if _stamp(path) != stamp:
                return f"{path} changed after it was imported."
        return None

    def _send(self, message: dict[str, Any]) -> None:
        payload = json.dumps(message).encode()
        try:
            self._channel.sendall(_LENGTH.pack(len(payload)) + payload)
        except OSError:
            pass  # the worker is gone: the next read says so


def _read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat (proc(5)) from the third on; none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold anything
    except (OSError, UnicodeDecodeError):
        return []


def _started(pid: int) -> str | None:
    fields = _read_stat(pid)
    return fields[19] if fields else None


def _kill_with_descendants(pids: set[int]) -> None:
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {pid: int(fields[1]) for pid in processes if (fields := _read_stat(pid))}
    doomed: set[int] = set()
    while pids:
        doomed |= pids
        pids = {pid for pid, parent in parents.items() if parent in doomed} - doomed
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _attempt(action: Callable[[str], object], name: str) -> str | None:
    """Run *action* on *name*; returns one line that says what went wrong, if anything did."""
    try:
        action(name)
    except Exception as exc:  # noqa: BLE001 - user code: a run that needs it will report the error as its own
        return f"{name}: {type(exc).__name__}: {exc}"
    if threading.active_count() != 1:
        return f"{name}: started a thread, so nothing can be forked after it"
    return None


def _call(name: str) -> object:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)()


def _project_files() -> list[str]:
    """Files of the imported modules that a user may edit: all but the standard library's and installed packages'."""
    paths = sysconfig.get_paths()
    installed = tuple(
        str(Path(paths[key]).resolve()) + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return sorted({file for file in files if file and not str(Path(file).resolve()).startswith(installed)})


def _installation() -> set[str]:
    """Folders whose time of change moves when a package is installed, upgraded or removed."""
    return {sysconfig.get_path(key) for key in ("purelib", "platlib")}


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _notice_sigterm() -> None:
    """Let SIGURG make this process act on a SIGTERM that it has missed; nothing else is known to use that signal.

    Python misses it in two ways, and both were seen. A handler is called between two of Python's own steps: when the
    signal arrives just before a call that blocks, not until that returns. Another signal that has a handler interrupts
    the call. And what a handler raises is dropped when it comes up in a finalizer or the callback of a weak reference.
    """
    dropped = False

    def note(unraisable: sys.UnraisableHookArgs) -> None:
        nonlocal dropped
        dropped = dropped or not issubclass(unraisable.exc_type, Exception)
        sys.__unraisablehook__(unraisable)

    def look(*_: object) -> None:
        nonlocal dropped
        if dropped:
            dropped = False
            signal.raise_signal(signal.SIGTERM)

    sys.unraisablehook = note
    signal.signal(signal.SIGURG, look)


def _enter(env: dict[str, str], cwd: str) -> None:
    """Give the child what a new process would have got: environment, folder, import path, random numbers."""
    # Only what differs: to set all of it anew costs a hundred times what these few do, and copies a megabyte.
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    for name, value in env.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if hasattr(time, "tzset"):
        time.tzset()
    os.chdir(cwd)
    if not sys.flags.safe_path:
        sys.path[0] = cwd  # as with `python -m`
    random.seed()
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()


def _run(target: str, arguments: dict[str, Any]) -> int:
    """Call *target* and turn how it ends into an exit code, as the interpreter would at the top level."""
    module, _, function = target.partition(":")
    try:
        code = getattr(importlib.import_module(module), function)(**arguments)
    except SystemExit as exc:
        code = exc.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _leave(code: int) -> NoReturn:
    """Do what the interpreter does at exit, but not its teardown: that would touch, and so copy, every page."""
    try:
        threading._shutdown()  # type: ignore[attr-defined] # multiprocessing leaves its children the same way
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - nothing may keep the child alive
        traceback.print_exc()
    finally:
        os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phasewise.forkserver", description="Started by a worker.")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the Unix socket to the worker")
    parser.add_argument("--preload", action="append", default=[], help="module to import")
    parser.add_argument("--setup", action="append", default=[], help="module:function to call once")
    options = parser.parse_args(argv)
    # The worker ends this process by closing the socket; signals meant for the worker's terminal or group are not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.set_inheritable(options.channel, False)
    with socket.socket(fileno=options.channel) as channel:
        zygote = _Zygote(channel)
        zygote.prepare(options.preload, options.setup)
        zygote.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
