"""What is done once before flow runs are forked. Runs in the forkserver, so that each fork finds it done."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import ssl
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import certifi
from prefect.settings import get_current_settings
from pydantic import BaseModel

from phasewise.patches import entries
from phasewise.patches.registry import apply, may_apply
from phasewise.worker.child import observe_suspension, send_heartbeats


def warm_up() -> None:
    """Do once what Prefect would do in every flow run: none of it depends on the run."""
    from prefect.logging.handlers import PrefectConsoleHandler

    # Each client and socket reads the certificate authorities anew: five times a run, 22 ms and 1 MiB each.
    shared = _SharedContexts("ssl")
    if apply(entries.TLS_CONTEXT_ONCE, lambda _: shared):
        shared.create_default_context(cafile=get_current_settings().api.ssl_cert_file or certifi.where())
    for model in _subclasses(BaseModel):
        if model.__module__.startswith("prefect.") and not model.__pydantic_complete__:
            with contextlib.suppress(Exception):  # it stays as it was: pydantic tries again on first use
                model.model_rebuild()
    # The console's highlighter compiles its twenty patterns when it has something to show.
    record = logging.LogRecord("prefect.flow_runs", logging.INFO, __file__, 1, "Warm.", None, None)
    PrefectConsoleHandler(stream=io.StringIO()).emit(record)
    apply(entries.OWN_HEARTBEATS, lambda _: send_heartbeats)
    apply(entries.HEAR_SUSPENSION, lambda _: observe_suspension)
    for patch in entries.PATCHES:  # looked at once, for all runs that are forked
        if patch.process == "run":
            may_apply(patch)


class _SharedContexts(ModuleType):
    """The module ``ssl``, but a default context is made once for the same arguments."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ssl, name)

    @functools.cached_property
    def create_default_context(self) -> Callable[..., ssl.SSLContext]:
        return functools.cache(ssl.create_default_context)


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
