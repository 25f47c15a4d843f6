"""The command ``phasewise doctor``: which patches of Prefect are in force here, and why."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from phasewise.patches.entries import list_patches
from phasewise.patches.registry import NEWEST_TESTED, Patch

_PATCHED = ("prefect", "pydocket", "sqlalchemy")


def describe_patches() -> Iterator[str]:
    """Yield the lines that ``phasewise doctor`` prints."""
    patches = list_patches()
    in_force = sum(reason is None for _, reason in patches)
    yield f"Versions: {', '.join(f'{name} {version(name)}' for name in _PATCHED)}."
    yield f"Tested up to prefect {NEWEST_TESTED}."
    yield f"Patches in force: {in_force} of {len(patches)}."
    for patch, reason in patches:
        yield ""
        yield from _describe(patch, reason)


def _describe(patch: Patch, reason: str | None) -> Iterator[str]:
    yield f"{patch.name} ({patch.process}): {'in force' if reason is None else f'not in force, {reason}'}"
    yield f"  Reason: {patch.why}"
    yield f"  Gain: {patch.gain}"
    yield f"  Since {patch.since}, until {patch.until}{f' ({patch.upstream})' if patch.upstream else ''}."
