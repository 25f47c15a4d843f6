"""CPU time and memory of process trees, read from /proc (Linux)."""

from __future__ import annotations

import contextlib
import os
import resource
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Process:
    pid: int
    parent: int
    #: Of itself and of the children that it has waited for.
    cpu_seconds: float


def descendants(root: int) -> list[int]:
    """Return the processes below *root*, zombies included."""
    return [process.pid for process in read_tree(root)]


def tree_cpu_seconds() -> float:
    """Return the CPU seconds that all processes below this one have used so far, user and system, living and ended.

    A process that ended is in the figures of whoever waited for it. One whose parent ended before it is adopted by
    the nearest subreaper above (see ``guard``), which waits for it, so nothing leaves the tree.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + sum(process.cpu_seconds for process in read_tree(os.getpid()))


def pss_bytes(pid: int) -> int:
    """Return the memory of a process, each page that it shares divided by the number of those who share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Pss")


def tree_pss_bytes() -> int:
    """Return the memory of all processes below this one, what they share counted once."""
    total = 0
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError, ValueError):  # it ended
            total += pss_bytes(pid)
    return total


def read_tree(root: int) -> list[Process]:
    children: dict[int, list[Process]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (process := _read(int(entry.name))):
            children[process.parent].append(process)
    found: list[Process] = []
    unseen = [root]
    while unseen:
        below = children[unseen.pop()]
        found += below
        unseen += [process.pid for process in below]
    return found


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it ended
        return None
    # After the name, which may hold spaces and parentheses. proc(5): ppid is field 4, the four times 14 to 17.
    fields = stat.rpartition(")")[2].split()
    return Process(pid=pid, parent=int(fields[1]), cpu_seconds=sum(map(int, fields[11:15])) / _TICKS)
