"""A flow whose module takes a moment to import, so that its run can be cancelled while it starts."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import flow

time.sleep(20)


@flow
def slow_to_start(file: str) -> None:
    Path(file).write_text("began")
    time.sleep(60)
