"""What the embedded Prefect server leaves out between a request and its answer. Runs in the server's process.

Nothing of it changes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from phasewise.patches import entries
from phasewise.patches.registry import apply, may_apply


def shorten_requests(app: FastAPI) -> None:
    """Make *app*, which Prefect's ``create_app`` returned, answer with less between; before its first request."""
    apply(entries.DEPENDENCIES_HERE, lambda _: _run_dependency)
    if not may_apply(entries.PLAIN_MIDDLEWARE):
        return
    for api in _applications(app):
        for index, middleware in enumerate(api.user_middleware):
            dispatch = middleware.kwargs.get("dispatch")
            if getattr(dispatch, "__name__", None) == "default_content_type":
                api.user_middleware[index] = Middleware(_DefaultContentType)


def _applications(app: FastAPI) -> Iterator[FastAPI]:
    yield app
    for route in app.routes:
        mounted = getattr(route, "app", None)
        if isinstance(mounted, FastAPI):
            yield mounted


async def _run_dependency(function: Callable[..., Any], **values: Any) -> Any:
    """Call what a route depends on; in a thread only where it might wait for something, which none of Prefect's does.

    A route has up to four of them, and each way to a thread and back costs more than most of them do.
    """
    if function.__module__.startswith("prefect.server."):
        return function(**values)
    return await run_in_threadpool(function, **values)


class _DefaultContentType:
    """Prefect's middleware of that name, which takes a body without a content type for JSON.

    Prefect's is a function of request and response, for which Starlette makes two tasks and two streams a request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in {"POST", "PUT", "PATCH"}:
            headers = Headers(scope=scope)
            if "content-type" not in headers and int(headers.get("content-length", "0")) > 0:
                scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]
        await self._app(scope, receive, send)
