import os
import signal
import socket
import subprocess
import sys

from phasewise.system.processes import identify_process, is_process_gone, start_time


def test_a_process_that_runs_is_not_gone_and_one_that_ended_is() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        identity = identify_process(other.pid)
        assert not is_process_gone(identity)
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(other.pid) is None, "a zombie has ended"
        assert is_process_gone(identity)

    assert is_process_gone(identity)


def test_a_later_process_with_the_same_number_is_another() -> None:
    host, pid, start = identify_process(os.getpid()).split("/")

    assert is_process_gone(f"{host}/{pid}/{int(start) - 1}")


def test_what_cannot_be_known_here_is_not_called_gone() -> None:
    assert not is_process_gone(f"elsewhere-{socket.gethostname()}/1/1")
    assert not is_process_gone(f"{socket.gethostname()}/1/")
    assert not is_process_gone("")
