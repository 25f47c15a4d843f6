"""The reference topology as data: how many steps, how long each takes, how many tables at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """One size of the reference topology.

    main ─┬─ phase 1 ─┬─ pre
          │           └─ sub ─┬─ table × N
          │                   └─ cleanup1 ‖ cleanup2
          └─ phase 2 ─── final

    A table sleeps ``seconds``; pre, the cleanups and final sleep a third of it. So the critical path is one table, one
    cleanup and final: 5/3 of ``seconds``, however many tables there are, as long as all of them run at once.
    """

    tables: int
    seconds: float
    #: Tables that may run at the same time.
    parallel: int

    @property
    def short(self) -> float:
        """What every step but a table sleeps, in seconds."""
        return self.seconds / 3

    @property
    def steps(self) -> int:
        """Steps that work: tables, pre, two cleanups, final. What only waits for others (main, sub) is overhead."""
        return self.tables + 4

    @property
    def name(self) -> str:
        return f"topology_{self.tables}_{str(self.seconds).replace('.', 'p')}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """When the system itself says that a run was submitted and completed: seconds since the epoch."""

    submitted: float
    completed: float

    @property
    def makespan(self) -> float:
        return self.completed - self.submitted
