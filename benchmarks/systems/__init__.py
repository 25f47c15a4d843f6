"""What is measured, one adapter each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.harness.load import Load, Measured

#: Runs one load on a system that is up, and returns when it has completed.
Submit = Callable[[Load], Measured]


class Unavailable(Exception):
    """This system cannot be measured here, for the reason in the message."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an adapter gets."""

    #: A folder of its own, kept between its starts within one benchmark.
    home: Path
    #: Where the environments of the peers are.
    environments: Path
    #: All loads that it will be asked for.
    loads: Sequence[Load]

    @property
    def parallel(self) -> int:
        return self.loads[0].parallel


class System(Protocol):
    """A system under measurement."""

    #: Loads with more tables are skipped; None: no bound.
    most_tables: int | None

    def version(self) -> str:
        """Return the version that is measured."""
        ...

    def running(self, context: Context) -> AbstractContextManager[Submit]:
        """Start the system for the time of the block; nothing of it is left afterwards.

        Raises:
            Unavailable: it cannot run here.
            Broken: it should run and does not.
        """
        ...


def load_systems() -> dict[str, System]:
    """Return all systems by name, in the order of the documentation."""
    from benchmarks.systems import airflow, phasewise, programs, stock

    return {
        "phasewise": phasewise.Phasewise(),
        "phasewise-postgresql": phasewise.PhasewisePostgresql(),
        "phasewise-local": phasewise.PhasewiseLocal(),
        "stock": stock.Stock(),
        "airflow": airflow.Airflow(),
        "dagster": programs.Dagster(),
        "luigi": programs.Luigi(),
        "floor": programs.Floor(),
    }
