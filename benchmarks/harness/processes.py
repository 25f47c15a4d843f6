"""Start the processes of a system so that they end with the benchmark, and talk to them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_GUARD = Path(__file__).with_name("guard.py")
#: Variables of the user's own installations that would change what is measured.
_FOREIGN = ("PREFECT_", "PHASEWISE_", "AIRFLOW", "DAGSTER", "LUIGI", "PYTHON", "VIRTUAL_ENV")


class Broken(Exception):
    """A system under measurement did not do what it should; the message names its log."""


def clean_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without what would configure one of the systems, and with *extra*."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    return {**own, "DO_NOT_TRACK": "1", **extra}


@contextlib.contextmanager
def service(
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str],
    cwd: Path,
    user: int | None = None,
    piped: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """Run *command* below a guard for the time of the block; what it prints goes to *log*."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        guard = subprocess.Popen(
            # -S -E: the guard starts in 10 ms, and whatever the command's environment says is not for it.
            [sys.executable, "-S", "-E", str(_GUARD), *_as_user(user), *map(str, command)],
            env={**env, "BENCHMARK_PID": str(os.getpid())},
            cwd=cwd,
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else file,
            stderr=file,
            text=True,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the block
        )
    try:
        yield guard
    finally:
        guard.terminate()
        guard.wait()
        for pipe in (guard.stdin, guard.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _as_user(user: int | None) -> list[str]:
    return [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def run(
    command: Sequence[str | Path], *, log: Path, env: Mapping[str, str], cwd: Path, user: int | None = None
) -> None:
    """Run *command* to its end.

    Raises:
        Broken: its exit code was not 0.
    """
    with service(command, log=log, env=env, cwd=cwd, user=user) as guard:
        code = guard.wait()
    if code:
        raise Broken(f"{command[0]} ended with exit code {code}: see {log}")


def wait_until(condition: Callable[[], T], what: str, *, seconds: float, pause: float = 0.1) -> T:
    """Return what *condition* returns as soon as that is true; an unreachable server counts as not yet.

    Raises:
        Broken: it was not true within *seconds*.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except (OSError, ValueError):
            pass
        if time.monotonic() > deadline:
            raise Broken(f"{what}: not within {seconds:g} seconds")
        time.sleep(pause)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def request(url: str, body: object = None, *, token: str | None = None) -> Any:
    """Send a GET, or a POST of *body* as JSON, and return the JSON that comes back."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    # Not through a proxy: it is on the loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers), timeout=30) as response:  # noqa: S310
        return json.load(response)
