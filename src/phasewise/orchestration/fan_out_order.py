"""In which order the items of a fan-out start: pure arithmetic, no server.

An item is what one flow run of the fan-out is for: a table, or a partition of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def order_longest_first(items: Sequence[str], *, durations: Mapping[str, float], sizes: Mapping[str, int]) -> list[str]:
    """Return *items* with the longest first, so that no long one is left over while the other slots stand idle.

    *durations* are the seconds of past batches, *sizes* rows of the source; both may lack items and name others.
    An item without history is scaled from its rows, by the median of the seconds per row of those that have both.
    An item with neither of them comes before all others: it may be the longest. Started last, it would stretch
    the fan-out by its whole length; started first, it costs nothing but its turn. Equals keep their order.
    """
    scale = _find_seconds_per_row(durations, sizes)
    if scale is None and durations.keys().isdisjoint(items):
        scale = 1.0  # no batch was ever timed: rows alone rank as well as the seconds that they would be scaled to
    expected = {item: rows * scale for item, rows in sizes.items()} if scale is not None else {}
    return sorted(items, key=lambda item: -durations.get(item, expected.get(item, float("inf"))))


def _find_seconds_per_row(durations: Mapping[str, float], sizes: Mapping[str, int]) -> float | None:
    """Return the median over rows, not over items: half of all rows were read faster than this.

    The time of a small table is the time to start its flow run: the median over items of a database with many small
    tables would take a large one for a hundred times longer than it is.
    """
    timed = sorted((durations[item] / rows, rows) for item, rows in sizes.items() if rows > 0 and item in durations)
    half = sum(rows for _, rows in timed) / 2
    for seconds_per_row, rows in timed:
        half -= rows
        if half <= 0:
            return seconds_per_row
    return None
