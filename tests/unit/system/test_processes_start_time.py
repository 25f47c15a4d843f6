"""Processes as the operating system knows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from phasewise.system.processes import start_time


def test_the_start_time_of_a_process_stays_and_differs_from_another(tmp_path: Path) -> None:
    own = start_time(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        its = start_time(other.pid)

    assert own == start_time(os.getpid())
    assert None not in (own, its)
    assert own != its
    assert start_time(other.pid) is None
