"""A password that a source puts into the environment is found by that source alone."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from phasewise.errors import LakeError
from phasewise.lake.credentials import find_own_password, lend_password
from phasewise.lake.session import open_server


def test_a_login_without_a_password_gets_what_the_process_came_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PGPASSWORD", "own")

    lend_password("PGPASSWORD", "of a source")
    assert (os.environ["PGPASSWORD"], find_own_password("PGPASSWORD")) == ("of a source", "own")
    lend_password("PGPASSWORD", "of another")
    assert (os.environ["PGPASSWORD"], find_own_password("PGPASSWORD")) == ("of another", "own")
    lend_password("PGPASSWORD", None)

    assert (os.environ["PGPASSWORD"], find_own_password("PGPASSWORD")) == ("own", "own")


def test_where_there_was_no_password_there_is_none_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)

    lend_password("PGPASSWORD", "of a source")
    assert find_own_password("PGPASSWORD") is None
    lend_password("PGPASSWORD", None)

    assert "PGPASSWORD" not in os.environ


@pytest.mark.parametrize(("own", "told"), [(None, None), ("own", b"own")])
def test_a_catalog_without_a_password_is_never_told_that_of_the_source(
    monkeypatch: pytest.MonkeyPatch, own: str | None, told: bytes | None
):
    monkeypatch.setenv("PGPASSFILE", "/nonexistent")
    monkeypatch.delenv("PGPASSWORD", raising=False)
    if own is not None:
        monkeypatch.setenv("PGPASSWORD", own)
    lend_password("PGPASSWORD", "of a source")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answers: list[bytes] = []
        thread = threading.Thread(target=_ask_for_passwords, args=(listener, answers))
        thread.start()
        url = f"postgresql://etl@127.0.0.1:{listener.getsockname()[1]}/db?sslmode=disable&gssencmode=disable"
        with pytest.raises(LakeError), open_server(url):
            pass
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)

    assert set(answers) <= {told}
    assert told is None or answers


def _ask_for_passwords(listener: socket.socket, answers: list[bytes]) -> None:
    """Be a PostgreSQL server that asks each login for its password, and hangs up."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(10)
            connection.recv(4096)
            connection.sendall(b"R\x00\x00\x00\x08\x00\x00\x00\x03")  # AuthenticationCleartextPassword
            if message := connection.recv(4096):
                answers.append(message[5:-1])
