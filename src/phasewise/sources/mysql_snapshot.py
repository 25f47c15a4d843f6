"""One moment of a MySQL server for several processes, by lending them the connections that hold it.

InnoDB cannot hand the snapshot of a transaction to another connection. So a few connections begin theirs while nobody
can commit (``FLUSH TABLES WITH READ LOCK``, held for milliseconds), and each process that reads a table is lent one of
them, through a socket in a folder that only this user can enter. One that comes back is lent to the next: any number
of tables is read at one moment with a few connections. Without the lock, one connection holds the moment
for all, and tables wait for one another.

Of MySQL's protocol only what the lending needs is spoken here: the greeting, which commands would end the transaction
(those are answered and not passed on), and KILL, for which DuckDB's scanner opens a second connection when it gives a
query up. Logging in to the server is PyMySQL's.
"""

from __future__ import annotations

import itertools
import re
import secrets
import selectors
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pymysql
from pymysql.constants import CLIENT

from phasewise.lake.credentials import find_own_password

_CHUNK = 256 * 1024
_FOLDER = "phasewise-mysql-"
#: Seconds after which the folder of a socket that nobody listens to is left over, and not about to be used.
_LEFT_AFTER_SECONDS = 60
#: Seconds that a lock is waited for: whoever wants to write waits behind it.
_LOCK_SECONDS = 5
#: Seconds in which a connection that was left in the middle of an answer must come to rest.
_SETTLE_SECONDS = 30.0
#: The server's own limit on ``wait_timeout``.
_LONGEST_WAIT = 31536000

_QUIT, _QUERY, _PING, _CHANGE_USER, _RESET = 0x01, 0x03, 0x0E, 0x11, 0x1F
#: What would end the transaction, or what is so already.
_NOT_PASSED_ON = re.compile(
    rb"\s*(?:START\s+TRANSACTION|BEGIN|COMMIT|ROLLBACK|SET\s+autocommit|SET\s+NAMES\s+utf8mb4\s*$)\b", re.IGNORECASE
)
_KILL = re.compile(rb"\s*KILL\s+(?:QUERY\s+)?(\d+)", re.IGNORECASE)
_OK = b"\x00\x00\x00\x02\x00\x00\x00"
#: The whole answer to a ping, whatever the flags of the session are.
_PONG = re.compile(rb"\x07\x00\x00\x01\x00\x00\x00..\x00\x00", re.DOTALL)
_GONE = b"\xff\x8c\x07" + b"#70100" + b"the moment that the batch held is gone"

_WITHOUT_TRANSACTIONS = """
SELECT t.table_name
FROM information_schema.tables t LEFT JOIN information_schema.engines e ON e.engine = t.engine
WHERE t.table_schema = database() AND t.table_type IN ('BASE TABLE', 'SYSTEM VERSIONED')
  AND coalesce(e.transactions, 'NO') <> 'YES'
"""


@dataclass(frozen=True, kw_only=True)
class Login:
    """How to connect to one database of a server."""

    host: str
    port: int
    user: str
    password: str | None = field(repr=False)
    database: str
    #: Parameters of the URL: ``ssl_mode``, ``ssl_ca``, ``ssl_capath``, ``ssl_cert``, ``ssl_key``, ``socket``.
    options: dict[str, str]
    connect_timeout: float


@dataclass(frozen=True, kw_only=True)
class LentSnapshot:
    #: What a client of MySQL connects to; any login is taken.
    socket: Path
    #: Tables of an engine without transactions: a connection that is lent reads them as they are now.
    without: tuple[str, ...]
    #: Why there is one connection only, so that tables are read one after another; None where there are several.
    slowed_by: str | None


class NoSnapshot(Exception):
    """The moment cannot be held; the text says why."""


@contextmanager
def lend_snapshot(login: Login, *, connections: int, idle_seconds: float) -> Iterator[LentSnapshot]:
    """Hold one moment of the database with up to *connections* connections and lend them while the block runs.

    The server ends a connection that is idle for *idle_seconds*, so that a moment cannot be held for ever.

    Raises:
        NoSnapshot: the login failed.
    """
    with ExitStack() as stack:
        try:
            control = _connect(login, idle_seconds)
            stack.callback(control.close)
            without = _list_without_transactions(control)
            held = [_Held(connection) for connection in _connect_many(login, connections, idle_seconds)]
            for one in held:
                stack.callback(one.close)
            problem = _begin_together(control, held)
        except (pymysql.err.MySQLError, OSError, ValueError) as exc:
            reason = exc.args[-1] if exc.args else exc
            raise NoSnapshot(f"its connections could not be opened together ({reason})") from exc
        # The path of a socket has at most 107 bytes, which that of a batch's folder may exceed.
        _remove_leftovers()
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lender = _Lender(control, held[:1] if problem else held, folder / "mysql.sock")
        stack.callback(lender.close)
        yield LentSnapshot(socket=folder / "mysql.sock", without=without, slowed_by=problem)


def _remove_leftovers() -> None:
    """Remove the folders of those who held a moment and were killed: nobody listens to their sockets."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:  # of another user, or just gone
            if time.time() - folder.stat().st_mtime < _LEFT_AFTER_SECONDS:
                continue
            try:
                probe.connect(str(folder / "mysql.sock"))
            except ConnectionRefusedError:
                shutil.rmtree(folder)


def _connect(login: Login, idle_seconds: float) -> pymysql.connections.Connection:
    password = login.password if login.password is not None else find_own_password("MYSQL_PWD") or ""
    connection = pymysql.connect(
        host=login.host,
        port=login.port,
        user=login.user,
        password=password.encode(),  # PyMySQL's own choice for a str is latin1
        database=login.database,
        unix_socket=login.options.get("socket"),
        charset="utf8mb4",
        autocommit=True,
        connect_timeout=max(1, round(login.connect_timeout)),
        program_name="phasewise",
        **_choose_tls(login.options),
    )
    # A table may stop reading for a while, when it writes what it has read.
    wait = min(max(1, round(idle_seconds)), _LONGEST_WAIT)
    connection.query(f"SET SESSION wait_timeout = {wait}, net_write_timeout = 600, lock_wait_timeout = {_LOCK_SECONDS}")
    return connection


def _connect_many(login: Login, wanted: int, idle_seconds: float) -> list[pymysql.connections.Connection]:
    """Open up to *wanted* connections: fewer, but one at least, where the server has no room for more."""
    opened = [_connect(login, idle_seconds)]
    with suppress(pymysql.err.OperationalError):
        while len(opened) < wanted:
            opened.append(_connect(login, idle_seconds))
    return opened


def _choose_tls(options: dict[str, str]) -> dict[str, Any]:
    """Return PyMySQL's arguments for the TLS that the URL asks for: by default TLS where the server offers it."""
    mode = options.get("ssl_mode", "preferred").lower()
    names = {"ssl_ca", "ssl_capath", "ssl_cert"} & set(options)
    if mode == "disabled":
        return {"ssl_disabled": True}
    if mode == "preferred" and not names:
        return {}
    context = ssl.create_default_context(cafile=options.get("ssl_ca"), capath=options.get("ssl_capath"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # which certificates that MySQL makes itself do not pass
    context.check_hostname = mode == "verify_identity"
    if not (mode.startswith("verify") or names & {"ssl_ca", "ssl_capath"}):
        context.verify_mode = ssl.CERT_NONE
    if "ssl_cert" in options:
        context.load_cert_chain(options["ssl_cert"], options.get("ssl_key"))
    return {"ssl": context}


def _list_without_transactions(control: pymysql.connections.Connection) -> tuple[str, ...]:
    with control.cursor() as cursor:
        cursor.execute(_WITHOUT_TRANSACTIONS)
        return tuple(str(name) for (name,) in cursor.fetchall())


def _begin_together(control: pymysql.connections.Connection, held: Sequence[_Held]) -> str | None:
    """Begin the transactions of *held* at one moment; return why only the first has one, None when all have."""
    problem = _lock(control) if len(held) > 1 else None
    try:
        for one in held[:1] if problem else held:
            one.connection.query("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            one.connection.query("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
    finally:
        control.query("UNLOCK TABLES")
    return problem


def _lock(control: pymysql.connections.Connection) -> str | None:
    """Keep everybody from committing; return why that was refused.

    ``LOCK TABLES``, for which less is to be granted, is no way: it waits for one table with another locked, and
    transactions of the source's own users died of the deadlock (error 1213).
    """
    try:
        control.query("FLUSH TABLES WITH READ LOCK")
    except pymysql.err.MySQLError as exc:
        return f"{exc.args[-1]}; to read several at a time: GRANT RELOAD ON *.*"
    return None


class _Held:
    """One connection whose transaction is at the moment."""

    def __init__(self, connection: pymysql.connections.Connection) -> None:
        self.connection = connection
        # PyMySQL has no public way to its socket; nothing of an answer is left in its buffer between two queries.
        self._socket: socket.socket = connection._sock

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
        self.connection._force_close()  # close() would send a farewell, which takes a connection that still answers

    def serve(self, client: socket.socket, first: bytes, answer: Callable[[bytes], bytes | None]) -> None:
        """Be the server of *client*, whose *first* command is this, until it leaves; but for what *answer* answers."""
        self._socket.sendall(first)
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            selector.register(self._socket, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._socket:
                        self._pass_answer(client)
                    elif not self._pass_command(client, answer):
                        return

    def settle(self, end_query: Callable[[int], None]) -> bool:
        """Come to rest, also from the middle of an answer that nobody reads; False when the connection is lost."""
        try:
            self._socket.sendall(_frame(0, bytes([_PING])))
            if self._drain(1.0):
                return True
            end_query(self.connection.thread_id())
            return self._drain(_SETTLE_SECONDS)
        except (OSError, pymysql.err.MySQLError):
            return False

    def _drain(self, seconds: float) -> bool:
        """Read until the answer to a ping is the last that comes; False when that takes longer than *seconds*."""
        deadline, seen, tail = time.monotonic() + seconds, 0, b""
        try:
            while (left := deadline - time.monotonic()) > 0:
                is_pong = bool(_PONG.fullmatch(tail))
                if is_pong and seen == len(tail):
                    return True
                # Behind other data, it may be a part of that: then more comes at once.
                self._socket.settimeout(min(left, 0.2) if is_pong else left)
                try:
                    data = self._socket.recv(_CHUNK)
                except TimeoutError:
                    return is_pong
                if not data:
                    raise ConnectionResetError
                seen, tail = seen + len(data), (tail + data)[-11:]
            return False
        finally:
            self._socket.settimeout(None)

    def greet(self, number: int) -> bytes:
        """Return the server's greeting for the client *number*, which is its id when it wants a query ended."""
        # Both ends must have agreed on the same form of answers: what PyMySQL did not ask for is not offered.
        known = int(self.connection.client_flag) & int(self.connection.server_capabilities)
        flags = (known | CLIENT.LONG_PASSWORD | CLIENT.CONNECT_WITH_DB) & ~CLIENT.SSL
        scramble = secrets.token_hex(10).encode()
        version: str = self.connection.get_server_info()
        return (
            b"\x0a"
            + version.encode()
            + struct.pack("<BI8sBHBHHB10x", 0, number, scramble[:8], 0, flags & 0xFFFF, 45, 2, flags >> 16, 21)
            + scramble[8:]
            + b"\x00mysql_native_password\x00"
        )

    def _pass_answer(self, client: socket.socket) -> None:
        data = self._socket.recv(_CHUNK)
        if not data:
            raise ConnectionResetError
        client.sendall(data)
        while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            client.sendall(self._socket.recv(_CHUNK))

    def _pass_command(self, client: socket.socket, answer: Callable[[bytes], bytes | None]) -> bool:
        """Pass one command on, or answer it; False when the client has left."""
        packet = _read_packet(client)
        if _is_farewell(packet):
            return False
        answered = answer(packet)
        if answered is None:
            self._socket.sendall(packet)
        else:
            client.sendall(answered)
        return True


class _Lender:
    """Lends each client that connects to *path* a connection, and lets it wait while all are lent."""

    def __init__(self, control: pymysql.connections.Connection, held: Sequence[_Held], path: Path) -> None:
        self._control, self._control_lock = control, threading.Lock()
        self._free, self._alive, self._lent = list(held), len(held), dict[int, _Held]()
        self._numbers, self._greet = itertools.count(1), held[0].greet
        self._changed = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, name="mysql-moment", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._free, self._alive = [], 0
            self._changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._lend, args=(client,), name="mysql-moment-lent", daemon=True).start()

    def _lend(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            number = next(self._numbers)
            client.sendall(_frame(0, self._greet(number)))
            _read_packet(client)  # its login, of no matter here
            client.sendall(_frame(2, _OK))
            packet = _read_packet(client)
            while not _is_farewell(packet):
                answered = self._answer(packet)
                if answered is None:
                    self._lend_for(client, number, packet)
                    return
                client.sendall(answered)
                packet = _read_packet(client)

    def _lend_for(self, client: socket.socket, number: int, first: bytes) -> None:
        held = self._take()
        if held is None:
            client.sendall(_frame(1, _GONE))
            return
        self._lent[number] = held
        try:
            held.serve(client, first, self._answer)
        finally:
            del self._lent[number]
            self._give_back(held)

    def _answer(self, packet: bytes) -> bytes | None:
        """Return the answer to a command that is not for the server, None when it is."""
        if packet[3] != 0 or packet[4] not in {_QUERY, _RESET}:
            return None
        if kill := _KILL.match(packet, 5):
            held = self._lent.get(int(kill[1]))
            with suppress(pymysql.err.MySQLError):  # the query then runs to its end
                if held is not None:
                    self._end_query(held.connection.thread_id())
        elif packet[4] == _QUERY and not _NOT_PASSED_ON.match(packet, 5):
            return None
        return _frame(1, _OK)

    def _take(self) -> _Held | None:
        """Return a connection, waiting for one; None when there is none any more."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free or not self._alive)
                if not self._free:
                    return None
                held = self._free.pop()
            if held.settle(self._end_query):  # the server may have ended it meanwhile
                return held
            self._lose(held)

    def _give_back(self, held: _Held) -> None:
        if not held.settle(self._end_query):
            self._lose(held)
            return
        with self._changed:
            self._free.append(held)
            self._changed.notify()

    def _lose(self, held: _Held) -> None:
        held.close()
        with self._changed:
            self._alive -= 1
            self._changed.notify_all()

    def _end_query(self, thread_id: int) -> None:
        with self._control_lock:
            self._control.query(f"KILL QUERY {thread_id}")


def _is_farewell(packet: bytes) -> bool:
    return len(packet) < 5 or (packet[3] == 0 and packet[4] in {_QUIT, _CHANGE_USER})


def _frame(sequence: int, payload: bytes) -> bytes:
    return struct.pack("<I", len(payload))[:3] + bytes([sequence]) + payload


def _read_packet(client: socket.socket) -> bytes:
    """Return one packet with its header; empty when the other end has left."""
    header = _read_exactly(client, 4)
    return header + _read_exactly(client, int.from_bytes(header[:3], "little")) if header else b""


def _read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        if not more:
            return b""
        data += more
    return data
