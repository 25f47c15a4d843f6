"""What a worker and its forkserver say to each other over one Unix socket, in frames. Runs in both processes.

A frame is four bytes of length, then JSON.

    worker      → forkserver   fork: target, arguments, env, cwd, and the descriptors for stdout and stderr
    worker      → forkserver   guard | release: a process that the worker itself has started
    forkserver  → worker       ready | forked | refused | exited
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from phasewise.errors import OrchestrationError

LENGTH = struct.Struct("!I")


class ForkserverDied(OrchestrationError):
    """The forkserver ended or never became ready; what it had forked was killed with it."""


class ForkRefused(OrchestrationError):
    """The forkserver will not fork this run, for the reason in the message.

    ``stale`` is true when a file that it had imported has changed since: a new forkserver would serve the run.
    """

    def __init__(self, reason: str, *, stale: bool = False) -> None:
        self.stale = stale
        super().__init__(reason)


def frames(buffer: bytearray) -> Iterator[dict[str, Any]]:
    """Yield the complete frames at the head of *buffer* and remove them from it."""
    while len(buffer) >= LENGTH.size:
        end = LENGTH.size + LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        message = json.loads(bytes(buffer[LENGTH.size : end]))
        del buffer[:end]
        yield message
