"""A source that is reached by TLS: read as any other, and an error that says what is wrong with a certificate."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from phasewise.errors import SourceUnavailable
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.sources import check_project, describe_project_table, open_source
from phasewise.staging.batch import begin_batch
from phasewise.staging.extract import extract_table
from phasewise.staging.source_snapshot import open_snapshot
from tests.servers import NOBODY, find_binary, find_port, new_home, run, running

SETTINGS = Settings(threads=2, memory_limit="256MB", connect_timeout=5, min_free_bytes=0)
PASSWORD = "hush-hush"

pytestmark = [
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
    pytest.mark.timeout(120),
]


@dataclass(frozen=True, kw_only=True)
class Server:
    port: int
    #: The certificate of the authority that signed the server's.
    authority: Path
    #: The certificate of an authority that did not.
    stranger: Path

    def url(self, base: str, parameters: Mapping[str, str], missing: Path) -> str:
        """Return *base* with the server's port, and with *parameters* whose values may name a certificate."""
        paths = {"authority": self.authority, "stranger": self.stranger, "missing": missing}
        query = "&".join(f"{name}={paths.get(value, value)}" for name, value in parameters.items())
        return f"{base.format(password=PASSWORD, port=self.port)}?{query}"


POSTGRESQL = "postgresql://postgres:{password}@localhost:{port}/postgres"
MARIADB = "mysql://etl:{password}@localhost:{port}/shop"


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("postgres_scanner", "mysql_scanner"))


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Server]:
    if find_binary("postgres") is None:
        pytest.skip("PostgreSQL's server is not installed")
    with serve(run_postgresql) as server:
        yield server


@pytest.fixture(scope="module")
def mariadb() -> Iterator[Server]:
    if find_binary("mariadbd") is None or find_binary("mariadb-install-db") is None:
        pytest.skip("MariaDB's server is not installed")
    with serve(run_mariadb) as server:
        yield server


@contextmanager
def serve(run_server: Callable[[Path], AbstractContextManager[int]]) -> Iterator[Server]:
    """Run a server that takes connections by TLS only, with a table ``t``."""
    with new_home() as home:
        authority, stranger = make_authority(home, "authority"), make_authority(home, "stranger")
        make_certificate(home, "server", authority)
        for path in home.iterdir():
            os.chown(path, NOBODY or os.getuid(), -1)
        with run_server(home) as port:
            yield Server(port=port, authority=authority, stranger=stranger)


@contextmanager
def run_postgresql(home: Path) -> Iterator[int]:
    server, data = find_binary("postgres"), home / "data"
    assert server is not None
    (home / "password").write_text(PASSWORD)
    arguments = ["-D", data, "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={home / 'password'}", "--no-sync"]
    run([server.parent / "initdb", *arguments], home, user=NOBODY)
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
    port = find_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "ssl": "on",
        "ssl_cert_file": home / "server.crt",
        "ssl_key_file": home / "server.key",
        "fsync": "off",
    }
    options = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
    login = f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=require connect_timeout=5"
    client = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", "CREATE TABLE t AS SELECT 7 AS n", login]
    command = [server, "-D", data, "-p", str(port), *options]
    with running(command, home, client, variables={"PGPASSWORD": PASSWORD}, end=signal.SIGINT):
        yield port


@contextmanager
def run_mariadb(home: Path) -> Iterator[int]:
    user = ["--user=nobody"] if NOBODY else []
    common = ["--no-defaults", *user, f"--datadir={home / 'data'}"]
    run(["mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db"], home)
    port, sock = find_port(), home / "socket"
    tls = [f"--ssl-{name}={home / file}" for name, file in (("cert", "server.crt"), ("key", "server.key"))]
    options = ["--bind-address=127.0.0.1", f"--port={port}", f"--socket={sock}", "--require-secure-transport=on"]
    sql = (
        "CREATE DATABASE shop; CREATE TABLE shop.t (n int PRIMARY KEY); INSERT INTO shop.t VALUES (7); "
        f"CREATE USER etl@'%' IDENTIFIED BY '{PASSWORD}'; GRANT SELECT, RELOAD ON *.* TO etl@'%'"
    )
    client = ["mariadb", "--no-defaults", f"--socket={sock}", "--user=root", "-e", sql]
    with running([find_binary("mariadbd") or "", *common, *options, *tls], home, client):
        yield port


def make_authority(home: Path, name: str) -> Path:
    subject = ["-subj", f"/CN={name}", "-days", "2", "-nodes", "-newkey", "rsa:2048"]
    files = ["-keyout", f"{name}.key", "-out", f"{name}.crt"]
    run(["openssl", "req", "-x509", *subject, *files], home)
    return home / f"{name}.crt"


def make_certificate(home: Path, name: str, authority: Path) -> None:
    """Make a certificate for ``localhost``, and for no address."""
    request = ["-subj", "/CN=localhost", "-nodes", "-newkey", "rsa:2048", "-keyout", f"{name}.key"]
    run(["openssl", "req", "-new", *request, "-out", f"{name}.csr"], home)
    (home / "names").write_text("subjectAltName=DNS:localhost")
    signer = ["-CA", authority, "-CAkey", authority.with_suffix(".key"), "-CAcreateserial", "-days", "2"]
    run(["openssl", "x509", "-req", *signer, "-extfile", "names", "-in", f"{name}.csr", "-out", f"{name}.crt"], home)


def make_project(root: Path, url: str) -> Project:
    (root / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n')
    return load_project(root)


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_postgresql_is_read_by_tls(tmp_path: Path, postgresql: Server, mode: str):
    check_read(tmp_path, postgresql.url(POSTGRESQL, {"sslmode": mode, "sslrootcert": "authority"}, tmp_path))


@pytest.mark.parametrize("mode", ["required", "verify_ca", "verify_identity"])
def test_mariadb_is_read_by_tls(tmp_path: Path, mariadb: Server, mode: str):
    check_read(tmp_path, mariadb.url(MARIADB, {"ssl_mode": mode, "ssl_ca": "authority"}, tmp_path))


def check_read(root: Path, url: str) -> None:
    project = make_project(root, url)
    begin_batch(project, "b1", ["t"])

    assert check_project(project, SETTINGS) == []
    assert [c.type for c in describe_project_table(project, open_source(project, SETTINGS), "t").columns] == ["INTEGER"]
    with open_snapshot(project, SETTINGS, "b1") as token:
        manifest = extract_table(project, SETTINGS, batch="b1", table="t")

    assert token is not None
    assert (manifest.rows, manifest.source_rows, manifest.snapshot) == (1, 1, token["id"])
    assert PASSWORD not in manifest.to_json()


@pytest.mark.parametrize(
    ("host", "parameters", "what", "advice"),
    [
        ("localhost", {"sslmode": "verify-full", "sslrootcert": "stranger"}, "verify failed", "authority"),
        ("localhost", {"sslmode": "verify-ca", "sslrootcert": "stranger"}, "verify failed", "authority"),
        ("localhost", {"sslmode": "verify-full", "sslrootcert": "missing"}, "missing.crt", "sslrootcert"),
        ("127.0.0.1", {"sslmode": "verify-full", "sslrootcert": "authority"}, "localhost", "verify-ca"),
        ("localhost", {"sslmode": "disable"}, "no encryption", "sslmode=verify-full"),
    ],
    ids=["another authority", "another authority, any name", "no file", "another name", "without TLS"],
)
def test_a_certificate_of_postgresql_that_does_not_fit_is_an_error_that_says_so(
    tmp_path: Path, postgresql: Server, host: str, parameters: dict[str, str], what: str, advice: str
):
    url = postgresql.url(POSTGRESQL.replace("localhost", host), parameters, tmp_path / "missing.crt")

    check_error(tmp_path, url, f"@{host}:{postgresql.port}/postgres", what, advice)


@pytest.mark.parametrize("mode", ["verify_ca", "verify_identity"])
def test_a_certificate_of_mariadb_that_does_not_fit_is_an_error_that_says_so(
    tmp_path: Path, mariadb: Server, mode: str
):
    url = mariadb.url(MARIADB, {"ssl_mode": mode, "ssl_ca": "stranger"}, tmp_path)

    check_error(tmp_path, url, f"@localhost:{mariadb.port}/shop", "TLS/SSL error", "ssl_ca")


def check_error(root: Path, url: str, source: str, what: str, advice: str) -> None:
    project = make_project(root, url)

    with pytest.raises(SourceUnavailable) as caught:
        extract_table(project, SETTINGS, batch="b1", table="t")

    assert what in str(caught.value)
    assert source in str(caught.value)
    assert advice in str(caught.value.hint)
    assert PASSWORD not in f"{caught.value} {caught.value.hint} {caught.value!r} {caught.value.__cause__}"
