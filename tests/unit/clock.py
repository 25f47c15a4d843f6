"""An event loop whose time passes only while everything waits: minutes of waiting take milliseconds to test."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

R = TypeVar("R")


class FakeClockLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s; jumps to the next timer as soon as nothing else is left to do."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: FakeClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits, and no timer will ever end that"
            self._loop.now += timeout
        return ready


def run_on_fake_clock(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run *coroutine* on a loop of its own; every sleep and timeout in it is over at once, in the right order."""
    with asyncio.Runner(loop_factory=FakeClockLoop) as runner:
        return runner.run(coroutine)
