"""Runs one command and leaves nothing of it behind: ``python guard.py COMMAND…``. Standard library only.

It adopts whatever loses its parent, waits for it (so that its CPU time is counted), and kills everything below itself
when the command ends, when it gets a signal, or when the process that started it dies, even by kill -9.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_GRACE_SECONDS = 10.0

_prctl = ctypes.CDLL(None).prctl


def main() -> int:
    parent = int(os.environ.pop("BENCHMARK_PID"))
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        return 1
    command = subprocess.Popen(sys.argv[1:], preexec_fn=_in_child)
    code = _wait(command.pid)
    if code is None:
        command.terminate()
        code = _wait(command.pid, time.monotonic() + _GRACE_SECONDS)
    _kill_all()
    return 0 if code is None else code & 0xFF


def _in_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _wait(pid: int, deadline: float | None = None) -> int | None:
    """Wait for *pid*; return its exit code, or None when a signal came, or the deadline, before it ended."""
    while True:
        if deadline is None:
            received = signal.sigwait(_SIGNALS)
        else:
            found = signal.sigtimedwait(_SIGNALS, max(0.0, deadline - time.monotonic()))
            if found is None:
                return None
            received = signal.Signals(found.si_signo)
        if received is not signal.SIGCHLD and deadline is None:
            return None
        ended = _reap()
        if pid in ended:
            return ended[pid]


def _reap() -> dict[int, int]:
    ended = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _kill_all() -> None:
    me = os.getpid()
    while children := Path(f"/proc/{me}/task/{me}/children").read_text().split():
        for child in children:
            os.kill(int(child), signal.SIGKILL)  # not yet waited for, so the number is still its own
        while not _reap():
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
