"""What tests of warehouses share: a catalog in PostgreSQL, a bucket on S3, a process to kill."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import quote

import httpx
import pytest

from tests.servers import find_postgres, psql


@contextmanager
def postgres_catalog() -> Iterator[str]:
    """Yield the URL of a catalog in PostgreSQL that does not exist yet; drop it afterwards."""
    url = f"postgresql://postgres:a%20secret@{find_postgres()}/test?schema=pw_lake_{uuid.uuid4().hex[:10]}"
    try:
        yield url
    finally:
        drop_catalog(url)


def drop_catalog(url: str | None) -> None:
    """Drop the schema of a catalog in PostgreSQL; nothing where *url* is none."""
    if url is not None:
        psql(f"DROP SCHEMA IF EXISTS {url.rpartition('=')[2]} CASCADE")


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Yield the URL of a bucket on an S3 server of our own, which the environment says how to reach."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it writes a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key-of-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
        "AWS_REGION": "us-east-1",
    }
    try:
        httpx.put(f"http://{host}:{port}/lake").raise_for_status()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            # The servers of one process have their objects in common.
            yield f"s3://lake/shop-{uuid.uuid4().hex[:8]}"
    finally:
        server.stop()


def fork(run: Callable[[], object]) -> int:
    """Run *run* in a forked process and return its pid; the caller waits for it."""
    with warnings.catch_warnings():
        # Other tests of the session may have left idle threads; the child uses none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return pid


def put_object(name: str, content: bytes) -> None:
    """Write an object into the bucket of ``s3_bucket``, which must be open."""
    # Anonymous clients may not replace an object. The server does not check the signature.
    headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=key-of-tests/20260101/us-east-1/s3/aws4_request"}
    url = f"{os.environ['AWS_ENDPOINT_URL']}/lake/{quote(name)}"
    httpx.put(url, content=content, headers=headers).raise_for_status()
