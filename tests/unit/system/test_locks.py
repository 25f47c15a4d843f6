import subprocess
import sys
import time
from pathlib import Path

import pytest

from phasewise.system.locks import LockHeld, lock_file


def test_a_second_holder_is_refused_and_the_first_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    with lock_file(path, holder="the first"), pytest.raises(LockHeld) as refused, lock_file(path, holder="the second"):
        pass

    assert refused.value.holder == "the first"
    with lock_file(path):
        assert path.read_text() == ""


def test_a_lock_that_is_given_back_in_time_is_waited_for(tmp_path: Path) -> None:
    hold = "from pathlib import Path; import sys, time; from phasewise.system.locks import lock_file\n"
    hold += "with lock_file(Path(sys.argv[1])): print('held', flush=True); time.sleep(0.3)"
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()

        with pytest.raises(LockHeld), lock_file(path):
            pass
        with lock_file(path, timeout=30):
            pass

    assert other.returncode == 0


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    hold = "from pathlib import Path; import os, sys; from phasewise.system.locks import lock_file\n"
    hold += "with lock_file(Path(sys.argv[1]), holder='the dead'): os._exit(1)"
    path = tmp_path / "lock"
    subprocess.run([sys.executable, "-c", hold, str(path)], check=False)
    assert path.read_text() == "the dead"

    started = time.monotonic()
    with lock_file(path, holder="the living", timeout=30):
        assert path.read_text() == "the living"
    assert time.monotonic() - started < 5
