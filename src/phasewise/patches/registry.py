"""Whether a patch may be applied, and how it is applied. Runs in whichever process applies one.

A patch is applied only where its targets are what it was written for. Elsewhere one line is logged and the stock code
runs: a Prefect that nobody has tested yet works, only slower.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from phasewise.settings import Settings

#: The newest Prefect of ``make test-prefect-range``.
NEWEST_TESTED = "3.9.1"

_logger = logging.getLogger("phasewise.patches")
#: Owner, name and stock value of what was rebound in this process; the last is undone first.
_rebound: list[tuple[Any, str, Any]] = []
_ABSENT = object()
_LEFT_OUT = "PHASEWISE_PATCHES leaves it out"


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """One place where we replace, or depend on, the inside of another library."""

    name: str
    #: The process that it is for. ``run``: the process of one flow run.
    process: Literal["server", "worker", "run", "local"]
    #: ``package.module:attribute`` → its shape, as ``describe_shape`` gives it or as that begins, up to ``…``. One with
    #: a digest of the code is for what we have rewritten and not wrapped.
    targets: Mapping[str, str] = field(default_factory=dict)
    #: The same of what is only used: its names are private, or it is an injection point.
    needs: Mapping[str, str] = field(default_factory=dict)
    why: str
    #: What was measured: less CPU time of the server, worker or run, or what could not be done without it.
    gain: str
    #: The first version that it fits.
    since: str = "Prefect 3.9.1"
    #: What would end it.
    until: str
    #: Issue or pull request, where there is one.
    upstream: str = ""
    #: Whether PHASEWISE_PATCHES leaves it out: not what rebinds nothing, and not what a local run consists of.
    is_optional: bool = True


def apply(patch: Patch, replace: Callable[[Any], Any], *, on: object = None) -> bool:
    """Put ``replace(stock)`` in the place of each target; returns whether it was done.

    With *on*, an object of the class that has the targets, only that object gets it.
    """
    if not may_apply(patch):
        return False
    for path in patch.targets:
        owner, name = find_target(path)
        found = owner if on is None else on
        rebind(found, name, replace(getattr(found, name)))
    return True


def rebind(owner: Any, name: str, value: Any) -> None:
    """Set an attribute so that ``undo`` puts it back; for what ``apply`` cannot say, after ``may_apply``."""
    is_own = name in vars(owner) or inspect.ismemberdescriptor(getattr(type(owner), name, None))
    _rebound.append((owner, name, vars(owner).get(name, getattr(owner, name)) if is_own else _ABSENT))
    setattr(owner, name, value)


def may_apply(patch: Patch) -> bool:
    """Return whether *patch* may be applied; where its targets have changed, the log says so once."""
    _warn_of_untested_version()
    reason = why_not(patch)
    if reason is not None and reason != _LEFT_OUT:
        _warn_of_skipped(patch.name, reason)
    return reason is None


@functools.cache
def why_not(patch: Patch) -> str | None:
    """Say why *patch* is not applied in this process; None where it is. What was found at first holds."""
    if patch.is_optional and not left_out().isdisjoint({"off", f"-{patch.name}"}):
        return _LEFT_OUT
    for path, shape in {**patch.targets, **patch.needs}.items():
        try:
            owner, name = find_target(path)
            found = describe_shape(getattr(owner, name))
        except (ImportError, AttributeError):
            return f"{path} is not there"
        wanted = shape.removesuffix("…")
        if not (found == shape or found.startswith(f"{wanted} ") or (wanted != shape and found.startswith(wanted))):
            return f"{path} is {found}, not {shape}"
    return None


def undo() -> None:
    """Put the stock code back in the place of all that was rebound in this process."""
    while _rebound:
        owner, name, stock = _rebound.pop()
        if stock is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, stock)


def describe_shape(target: Any) -> str:
    """Return what must stay the same of *target*: names and defaults of its parameters, and a digest of its code.

    Of text and tuples, themselves; of other values, their type.
    """
    if isinstance(target, (str, tuple)):
        return repr(target)
    if isinstance(target, ModuleType) or not callable(target):
        return type(target).__name__
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # built in
        return type(target).__name__
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
    signature = str(inspect.Signature(bare))
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):
        return signature
    # Without white space, which formatters change.
    return f"{signature} {hashlib.sha256(''.join(source.split()).encode()).hexdigest()[:8]}"


def find_target(path: str) -> tuple[Any, str]:
    """Return the object that has the last attribute of *path*, and the name of that attribute."""
    module, _, attributes = path.partition(":")
    *owners, name = attributes.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


@functools.cache
def left_out() -> frozenset[str]:
    """Return what PHASEWISE_PATCHES says: ``on``, ``off``, or names with a ``-`` before them."""
    return frozenset(Settings().patches.split(","))


@functools.cache
def _warn_of_skipped(name: str, reason: str) -> None:
    _logger.warning("Patch %s is not applied: %s. The stock code runs.", name, reason)


@functools.cache
def _warn_of_untested_version() -> None:
    from prefect import __version__

    if _numbers(__version__) > _numbers(NEWEST_TESTED):
        message = "Prefect %s is newer than %s, the newest that this version of Phasewise was tested with. %s"
        _logger.warning(message, __version__, NEWEST_TESTED, "What has changed in it runs unpatched, slower.")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
