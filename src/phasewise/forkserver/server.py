"""The forkserver's own process. Runs as ``python -m phasewise.forkserver.server``, started by the client.

When its socket closes it kills its children and what it guards. When it dies, the kernel kills its children (Linux). So
nothing that was forked outlives the worker. It imports the standard library, ``phasewise.system`` and
``phasewise.errors`` alone: what is preloaded is named by the worker.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from phasewise.forkserver.protocol import LENGTH, frames
from phasewise.system.processes import die_with_parent, kill_with_descendants, load_libc, start_time


class _ForkserverProcess:
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
        # Folders whose time of change moves when a package is installed, upgraded or removed.
        installation = {sysconfig.get_path(key) for key in ("purelib", "platlib")}
        watched = [*_project_files(), *installation]
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
        if guarded := {pid for pid, started in self._guarded.items() if started and start_time(pid) == started}:
            kill_with_descendants(guarded)

    def _read(self) -> bool:
        try:
            data, received, _, _ = socket.recv_fds(self._channel, 65536, 64)
        except ConnectionError:
            return False
        self._buffer += data
        self._fds += received
        for request in frames(self._buffer):
            if "guard" in request:
                self._guarded[request["guard"]] = start_time(request["guard"])
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
        load_libc()
        forkserver = os.getpid()
        # Block signals until the child has handlers of its own: until then they would run the forkserver's.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become_child(request, fds, forkserver)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        # On both sides of the fork, so that the group exists before the worker can signal it.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._children.add(pid)
        return pid

    def _become_child(self, request: dict[str, Any], fds: list[int], forkserver: int) -> NoReturn:
        code = 1
        try:
            die_with_parent(forkserver)
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
            self._channel.sendall(LENGTH.pack(len(payload)) + payload)
        except OSError:
            pass  # the worker is gone: the next read says so


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
    # Only what differs: to set all of it again costs a hundred times what these few do, and copies a megabyte.
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


def main(argv: Sequence[str]) -> int:
    """Serve the socket whose descriptor is the first argument; what to prepare is JSON in the second."""
    # The worker ends this process by closing the socket; signals meant for the worker's terminal or group are not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    descriptor = int(argv[0])
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as channel:
        process = _ForkserverProcess(channel)
        process.prepare(**json.loads(argv[1]))
        process.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
