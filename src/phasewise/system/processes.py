"""Processes of the operating system: who is alive, who dies with whom, and how a process and all below it are ended."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send *signum* to this process when its parent dies, even by kill -9 (Linux only).

    It follows the thread that forked, so the parent must fork from a thread that lives as long as itself.
    """
    if not sys.platform.startswith("linux"):
        return
    load_libc().prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if os.getppid() != parent_pid:  # the parent died before the call: nobody will send the signal
        os.kill(os.getpid(), signum)


@functools.cache
def load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat (proc(5)) from the third on; none for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return status.rpartition(")")[2].split()  # the name before may hold spaces and parentheses


def kill_with_descendants(pids: set[int]) -> None:
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {pid: int(fields[1]) for pid in processes if (fields := _read_stat(pid))}
    doomed: set[int] = set()
    while pids:
        doomed |= pids
        pids = {pid for pid, parent in parents.items() if parent in doomed} - doomed
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def identify_process(pid: int) -> str:
    """Return ``host/pid/start``, which names the process among those of all machines."""
    return f"{socket.gethostname()}/{pid}/{start_time(pid) or ''}"


def is_process_gone(identity: str) -> bool:
    """Tell whether the process that ``identify_process`` named has ended; False where that cannot be known here."""
    host, _, rest = identity.partition("/")
    pid, _, start = rest.partition("/")
    return host == socket.gethostname() and bool(start) and pid.isdigit() and not is_same_process(int(pid), start)


def is_same_process(pid: int, started: str) -> bool:
    return start_time(pid) == started


def start_time(pid: int) -> str | None:
    """Return what tells this process from a later one with the same number; None when it has ended."""
    if not sys.platform.startswith("linux"):
        return _start_time_by_ps(pid)
    fields = _read_stat(pid)
    # The state is field 3 of proc(5), the start time field 22. A zombie has ended.
    return fields[19] if fields and fields[0] not in "ZX" else None


def _start_time_by_ps(pid: int) -> str | None:
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
