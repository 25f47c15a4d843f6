"""The process that runs a stack: it starts the server and the workers, and restarts what dies.

It imports no Prefect, so it is small and up at once. Started by ``phasewise.stack``.

How nothing is left behind, whoever is killed:

- The command that started a stack for its own use holds one end of a pipe, the *lifeline*, and the supervisor the
  other. However the command dies, the kernel closes its end, and the supervisor stops in good order. A signal on the
  parent's death (PR_SET_PDEATHSIG) would come when the *thread* that started it ends, and leave no time for order.
- The supervisor has one thread, so its children do ask for that signal: if it is killed, they are killed.
- A worker's forkserver, and through it every flow run, ends when the worker does (see ``phasewise.forkserver``).
  The supervisor adopts what loses its parent and does not end before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from phasewise.errors import OrchestrationError
from phasewise.system.files import write_atomically
from phasewise.system.locks import LockHeld, lock_file
from phasewise.system.processes import die_with_parent, is_same_process, load_libc, start_time

#: The port of the first stack on a machine; others take a free one.
PREFERRED_PORT = 4200
START_SECONDS = 120.0
STOP_SECONDS = 30.0
_LOG_BYTES = 10 * 1024 * 1024
_RESTARTS = 5
_RESTARTS_WITHIN_SECONDS = 60.0
_PR_SET_CHILD_SUBREAPER = 36
#: Settings of the user's own Prefect that would send our processes to another server or database.
_FOREIGN = ("PREFECT_API_", "PREFECT_SERVER_API_", "PREFECT_SERVER_DATABASE_", "PREFECT_PROFILE", "PREFECT__")


class StackError(OrchestrationError):
    """The embedded stack could not be started or stopped."""


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """What the supervisor is to run; it crosses to it as JSON."""

    home: str
    pool: str
    workers: int
    worker_type: str = "warm-process"
    project_env: dict[str, str] = field(default_factory=dict)
    #: Seconds that the workers need to stop in good order.
    drain_seconds: float
    #: Descriptor whose end of file means: stop. None for a stack that stays.
    lifeline: int | None
    #: Descriptor to write one line of JSON to, when the stack is up or has failed.
    report: int


def client_environment(home: Path, api_url: str) -> dict[str, str]:
    """Return the variables with which a Prefect client talks to the stack of *home*.

    Prefect reads them when it is first imported.
    """
    return {
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_PROFILES_PATH": str(home / "prefect" / "profiles.toml"),
        # Our server asks for no token; with this on, each client asks for one before its first change.
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


# ── the state file ───────────────────────────────────────────────────────────────────────────────────────────────


def state_file(home: Path) -> Path:
    return home / "stack.json"


def read_state(home: Path) -> dict[str, Any] | None:
    """Return the state of a stack whose supervisor lives."""
    try:
        state: dict[str, Any] = json.loads(state_file(home).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state if is_same_process(state["pid"], state["started"]) else None


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def answers(api_url: str, seconds: float = 2.0) -> bool:
    """Tell whether a Prefect server answers at *api_url* within *seconds*."""
    try:
        return _get(f"{api_url}/health", seconds=seconds) is True
    except (OSError, ValueError):
        return False


def _get(url: str, body: object = None, *, seconds: float = 2.0) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    # Not through the user's HTTP proxy: it is on the loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as response:
        return json.load(response)


# ── the supervisor ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True, eq=False)
class _Child:
    name: str
    command: list[str]
    fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=_RESTARTS + 1))

    @property
    def fails_too_often(self) -> bool:
        return len(self.starts) > _RESTARTS and self.starts[-1] - self.starts[0] < _RESTARTS_WITHIN_SECONDS


class _Stopped(Exception):
    """The stack is to end, for the reason in the message."""


class _Supervisor:
    def __init__(self, spec: StackSpec) -> None:
        self._spec = spec
        self._home = Path(spec.home)
        self._signals, writer = socket.socketpair()
        self._signals.setblocking(False)
        writer.setblocking(False)
        self._signal_writer = writer
        self._children: list[_Child] = []
        self._has_reported = False
        self._started = time.time()
        self._listening = listen()
        port = self._listening.getsockname()[1]
        self._api_url = f"http://127.0.0.1:{port}/api"
        self._env = stack_environment(self._home, port, spec.project_env)

    def run(self) -> None:
        """Run the stack until a signal, the lifeline's end or too many failures; leave no process behind."""
        load_libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, lambda *_: None)
        try:
            self._come_up()
            while True:
                self._wait(None)
        except _Stopped as reason:
            _log(f"stopping: {reason}")
            self._report({"error": f"The stack ended while it was starting: {reason}"})
        finally:
            self._stop_everything()
            state_file(self._home).unlink(missing_ok=True)

    def _come_up(self) -> None:
        fd = self._listening.fileno()
        command = [sys.executable, "-m", "phasewise.server.app", "--socket", str(fd)]
        self._start(_Child(name="server", command=command, fds=(fd,)))
        # At the same time: while the server imports, the workers do, and their first request waits at its socket.
        workers = self._start_workers(self._spec.workers)
        self._wait_for(lambda: answers(self._api_url), "the server")
        self._introduce(workers)
        self._report(self._info())

    def _start_workers(self, count: int) -> list[str]:
        names = []
        for _ in range(count):
            name = f"worker-{len(self._children)}"
            command = [sys.executable, "-m", "phasewise.worker", "--pool", self._spec.pool, "--name", name]
            self._start(_Child(name=name, command=[*command, "--type", self._spec.worker_type]))
            names.append(name)
        return names

    def _introduce(self, workers: list[str]) -> None:
        """Wait until *workers* have reported to the server, then let other commands see them."""
        self._wait_for(lambda: set(workers) <= self._online(), "the workers")
        write_atomically(state_file(self._home), json.dumps({**self._info(), "started": start_time(os.getpid())}))

    def _online(self) -> set[str]:
        try:
            found = _get(f"{self._api_url}/work_pools/{self._spec.pool}/workers/filter", {})
        except (OSError, ValueError):
            return set()
        since = datetime.fromtimestamp(self._started, UTC)
        # A worker of the same name that ran a minute ago counts as online too: look at when it reported.
        return {worker["name"] for worker in found if datetime.fromisoformat(worker["last_heartbeat_time"]) > since}

    def _info(self) -> dict[str, Any]:
        return {
            "api_url": self._api_url,
            "ui_url": self._api_url.removesuffix("/api"),
            "pid": os.getpid(),
            "pool": self._spec.pool,
            "workers": [child.name for child in self._children if child.name != "server"],
        }

    def _report(self, report: dict[str, Any]) -> None:
        """Tell the command that started us, once."""
        if self._has_reported:
            return
        self._has_reported = True
        with contextlib.suppress(OSError):  # it has given up
            os.write(self._spec.report, json.dumps(report).encode() + b"\n")
        os.close(self._spec.report)

    # ── children ─────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, child: _Child) -> None:
        supervisor = os.getpid()
        with _open_log(self._home / "logs" / f"{child.name}.log") as log:
            child.process = subprocess.Popen(
                child.command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=child.fds,
                cwd=self._home,
                # Before exec, so that there is no moment at which the child would survive us. We have one thread.
                preexec_fn=lambda: die_with_parent(supervisor),
            )
        child.starts.append(time.monotonic())
        if child not in self._children:
            self._children.append(child)

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise _Stopped(f"{what} did not answer within {START_SECONDS:g} seconds")
            self._wait(0.05)

    def _wait(self, seconds: float | None) -> None:
        """Wait for a signal or the lifeline's end, and act on it."""
        lifeline = [] if self._spec.lifeline is None else [self._spec.lifeline]
        signals = self._signals.fileno()
        ready = select.select([signals, *lifeline], [], [], seconds)[0]
        if self._spec.lifeline in ready:
            raise _Stopped("the command that it ran for has ended")
        if signals not in ready:
            return
        received = set(self._signals.recv(4096))
        if received & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
            raise _Stopped("it was asked to")
        if signal.SIGCHLD in received:
            for child in self._reap():
                self._restart(child)
        if signal.SIGUSR1 in received:
            wanted = int((self._home / "workers.wanted").read_text())
            self._introduce(self._start_workers(wanted - (len(self._children) - 1)))

    def _reap(self) -> list[_Child]:
        """Collect what has ended, adopted processes included; returns the children among it."""
        ended = []
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                for child in self._children:
                    if child.process is not None and child.process.pid == found[0]:
                        child.process.returncode = os.waitstatus_to_exitcode(found[1])
                        ended.append(child)
        return ended

    def _restart(self, child: _Child) -> None:
        assert child.process is not None
        _log(f"{child.name} ended with exit code {child.process.returncode}")
        if child.fails_too_often:
            raise _Stopped(f"{child.name} ended {_RESTARTS + 1} times within {_RESTARTS_WITHIN_SECONDS:g} seconds")
        self._start(child)

    def _stop_everything(self) -> None:
        """End the workers, then the server, which they report their last states to, then whatever is left."""
        self._end([child for child in self._children if child.name != "server"], self._spec.drain_seconds + 10)
        self._end([child for child in self._children if child.name == "server"], 5)
        deadline = time.monotonic() + 5
        while left := _children():  # forkservers and flow runs whose worker was killed: they end by themselves
            self._reap()
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _end(self, children: list[_Child], seconds: float) -> None:
        for signum, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
            for child in children:
                if child.process is not None and child.process.returncode is None:
                    child.process.send_signal(signum)
            deadline = time.monotonic() + patience
            while any(child.process and child.process.returncode is None for child in children):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._reap()
                select.select([self._signals], [], [], min(left, 0.1))
                with contextlib.suppress(BlockingIOError):
                    self._signals.recv(4096)


def _children() -> list[int]:
    """Return the processes whose parent this one is, adopted ones included."""
    pid = os.getpid()
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def listen() -> socket.socket:
    """Return a listening socket on the loopback interface: on the preferred port, or where that is taken a free one.

    The supervisor holds it and hands it to the server: the port cannot be lost between choosing and binding it, and
    while a server that died is started again, its clients wait instead of being refused.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", PREFERRED_PORT))
    except OSError:
        listening.bind(("127.0.0.1", 0))
    listening.listen(512)
    return listening


def stack_environment(home: Path, port: int, project_env: Mapping[str, str]) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    api_url = f"http://127.0.0.1:{port}/api"
    return {
        # The task runs of a second are written together, and so are its events, not each state of each in a transaction
        # of its own; unless whoever starts the stack says otherwise.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
        **own,
        **client_environment(home, api_url),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_API_URL": api_url,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect' / 'prefect.db'}",
        # Nothing calls home.
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
        **project_env,
    }


def _open_log(path: Path) -> IO[bytes]:
    """Open a log to append to; a large one is put aside first, in place of the one put aside before."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def _log(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str]) -> int:
    spec = StackSpec(**json.loads(argv[0]))
    with contextlib.ExitStack() as held:
        try:
            _lock_home(held, Path(spec.home))
            supervisor = _Supervisor(spec)
        except StackError as exc:
            os.write(spec.report, json.dumps({"error": str(exc)}).encode() + b"\n")
            return 1
        supervisor.run()
    return 0


def _lock_home(held: contextlib.ExitStack, home: Path) -> None:
    try:  # the one before may be on its way out
        held.enter_context(lock_file(home / "supervisor.lock", timeout=STOP_SECONDS))
    except LockHeld as exc:
        raise StackError("A stack is already running here, but its server does not answer.", hint="make down") from exc


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
