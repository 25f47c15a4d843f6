"""Figures as people read them: counts, bytes, seconds, and the round steps of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal

#: Seconds between two ticks of a time axis.
_TIME_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


def format_bytes(value: int) -> str:
    """Return *value* bytes in decimal units, as disks are sold: ``1.4 MB``."""
    size = float(value)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "B" or abs(size) >= 99.5 else f"{size:.1f} {unit}"


def format_seconds(value: float) -> str:
    """Return *value* seconds: ``85 ms``, ``2.4 s``, ``3 min 05 s``, ``1 h 20 min``."""
    if value < 0:
        return f"−{format_seconds(-value)}"
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    if value < 9.95:
        return f"{value:.1f} s" if value >= 0.995 else f"{value:.2f} s"
    if value < 59.5:
        return f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_moment(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def format_value(value: object) -> str:
    """Return a cell's value; numbers without separators, because a year or an id may be one."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, datetime):
        return value.isoformat(sep=" ")
    return str(value)


def format_tick(value: float, step: float, largest: float) -> str:
    """Return the label of a tick of an axis with this *step* and *largest* tick: same unit, same decimals."""
    if value == 0:
        return "0"
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    # Below 10,000 the plain number is as short.
    scale, unit = next((pair for pair in units if largest >= max(pair[0], 1e4)), (1.0, ""))
    return f"{value / scale:,.{_decimals(step / scale)}f}{unit}"


def humanise(name: str) -> str:
    """Return a column's name as the label of an axis, with its unit: ``payroll_usd`` → ``payroll (USD)``."""
    words = name.replace("_", " ").strip()
    stem, _, last = words.rpartition(" ")
    unit = _UNITS.get(last.casefold())
    return f"{stem} ({unit})" if stem and unit else words


_UNITS = {
    "usd": "USD",
    "eur": "EUR",
    "musd": "million USD",
    "pct": "%",
    "percent": "%",
    "seconds": "s",
    "ms": "ms",
    "bytes": "bytes",
    "kg": "kg",
    "cm": "cm",
}


def is_number(value: object) -> bool:
    """Return whether *value* can be on an axis: a number within 1e300 that is not a truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    if isinstance(value, Decimal) and value.is_nan():
        return False
    # Nearer to the largest float the arithmetic of an axis overflows. NaN compares false.
    return bool(-1e300 < value < 1e300)


def to_moment(value: object) -> datetime | None:
    """Return a date, or the text of one, as a moment; None for everything else."""
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, str) and len(value) >= 10 and value[4:5] == "-":
        try:
            return to_moment(datetime.fromisoformat(value))
        except ValueError:
            return None
    return None


def looks_like_years(values: Sequence[float]) -> bool:
    return bool(values) and all(value == int(value) and 1000 <= value < 3000 for value in values)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about *count* round numbers that enclose *low* and *high*; at least two."""
    low, high = widen(low, high)
    rough = (high / count - low / count) or high - low
    magnitude = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next((factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough), rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    # Beyond the precision of a float a step may vanish next to the bounds.
    return [number * step for number in range(first, last + 1)] if last - first <= 4 * count else [low, high]


def widen(low: float, high: float) -> tuple[float, float]:
    """Return bounds that are far enough apart for an axis between them."""
    largest = max(abs(low), abs(high))
    # Nearer to each other than that, floats leave no room for a step between them.
    if high - low <= 1e-9 * largest:
        low, high = low - 0.05 * largest, high + 0.05 * largest
    return (low, high) if high > low else (0.0, 1.0)


def time_ticks(seconds: float, count: int) -> list[tuple[float, str]]:
    """Return at most *count* + 1 moments of an axis from 0 to *seconds*, with their labels."""
    fitting = (step for step in _TIME_STEPS if seconds / step <= count)
    step = next(fitting, 3600.0 * math.ceil(seconds / 3600 / count))
    return [(number * step, _label_time(number * step, step)) for number in range(int(seconds / step + 1e-9) + 1)]


def _label_time(moment: float, step: float) -> str:
    if step < 60:
        unit = f"{moment:.{_decimals(step)}f}" if moment < 60 or step < 1 else f"{moment:.0f}"
        return f"{unit} s"
    if step < 3600:
        return f"{moment / 60:.0f} min"
    return f"{moment / 3600:.0f} h"


def _decimals(step: float) -> int:
    if step <= 0 or not math.isfinite(step):
        return 0
    # Up to 300: a float holds no larger power of ten.
    exact = min(300, max(0, -math.floor(math.log10(step) + 1e-9)))
    # 0.25 needs one more than 0.2 does.
    return exact + 1 if abs(step * 10**exact - round(step * 10**exact)) > 1e-6 else exact
