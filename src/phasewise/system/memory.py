"""The memory of a process: limit it, and tell whether the kernel has killed something for want of it."""

from __future__ import annotations

import resource
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def limit_memory(pid: int, size_bytes: int) -> None:
    """Let process *pid*, and each process that it starts from now on, have at most *size_bytes* of data.

    Data is what a process can write to and shares with no other: heap, stacks, anonymous memory (RLIMIT_DATA). An
    allocation beyond it fails. A process that has ended already is left alone.
    """
    try:
        resource.prlimit(pid, resource.RLIMIT_DATA, (size_bytes, size_bytes))
    except ProcessLookupError:
        pass


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory: in our cgroup, else on this machine."""
    own = Path("/proc/self/cgroup").read_text().split()
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2].lstrip("/") for line in own}
    candidates = [
        _CGROUPS / paths.get("", "") / "memory.events",
        _CGROUPS / "memory" / paths.get("memory", "") / "memory.oom_control",
        Path("/proc/vmstat"),
    ]
    for file in candidates:
        try:
            lines = dict(line.split() for line in file.read_text().splitlines())
        except OSError:
            continue
        if "oom_kill" in lines:
            return int(lines["oom_kill"])
    return 0
