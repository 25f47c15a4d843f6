"""One chart per mart, drawn as SVG: bars, columns, a line or a scatter of points.

A chart never fails for the sake of its data: a value that cannot be drawn is left out and counted, a mart without
a column of numbers has no chart, and the table next to the chart always has the values.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from phasewise.report.figures import (
    format_tick,
    format_value,
    humanise,
    is_number,
    looks_like_years,
    nice_ticks,
    to_moment,
    widen,
)
from phasewise.report.records import MartReport

#: More bars than this do not fit a page; more points than that only make it heavy.
MAX_BARS = 25
MAX_POINTS = 2000

_FONT = 12
# What a datetime can hold, in seconds since 1970.
_FIRST_MOMENT = datetime.min.replace(tzinfo=UTC).timestamp()
_LAST_MOMENT = datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp()


@dataclass(frozen=True, kw_only=True)
class Point:
    #: Text of x.
    label: str
    x: float
    y: float
    #: What is shown when someone points at it: one line per column; empty: nothing.
    tip: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    kind: Literal["bars", "columns", "line", "scatter"]
    x_label: str
    y_label: str
    #: What *x* of a point is: its place in the list, a number, a year or seconds since 1970.
    x_is: Literal["place", "number", "year", "time"]
    points: tuple[Point, ...]
    #: Rows of the mart that the chart leaves out, because they are too many or have no number.
    left_out: int

    @property
    def summary(self) -> str:
        """Return what the chart shows, for those who cannot see it."""
        noun = {"bars": "Bar", "columns": "Column", "line": "Line", "scatter": "Scatter"}[self.kind]
        return f"{noun} chart: {self.y_label} by {self.x_label}, {len(self.points)} values."


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where the plot lies in the drawing, and how values become places."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)


def plan_chart(mart: MartReport) -> Chart | None:
    """Decide what the chart of *mart* shows; None when it has no column of numbers."""
    x = _find_column(mart, mart.x, default=0)
    y = _find_column(mart, mart.y, default=_first_numeric(mart, besides=x))
    if x is None or y is None:
        return None
    rows = [row for row in mart.rows if len(row) == len(mart.columns) and row[x] is not None and is_number(row[y])]
    x_is = _classify([row[x] for row in rows])
    kind = _choose_kind(mart.chart, x_is, [row[x] for row in rows])
    rows = rows[: MAX_BARS if kind == "bars" else MAX_POINTS]
    points = [_make_point(mart.columns, row, x, y, place, x_is) for place, row in enumerate(rows)]
    if kind in ("line", "columns"):
        points.sort(key=lambda point: point.x)
    if not points:
        return None
    return Chart(
        kind=kind,
        x_label=humanise(mart.columns[x]),
        y_label=humanise(mart.columns[y]),
        x_is=x_is,
        points=tuple(points),
        left_out=(mart.total_rows or len(mart.rows)) - len(points),
    )


def draw_chart(chart: Chart, width: int) -> tuple[Markup, int]:
    """Return *chart* as one SVG element, *width* CSS pixels wide, and its height; its colours come from the page."""
    draw = {"bars": _draw_bars, "columns": _draw_columns, "line": _draw_line, "scatter": _draw_scatter}
    body, height = draw[chart.kind](chart, width)
    drawing = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>').format(
        width, height, width, height, chart.summary, body
    )
    return drawing, height


def strip_tips(chart: Chart) -> Chart:
    """Return *chart* without tooltips: most of its size, for screens that have no pointer."""
    return replace(chart, points=tuple(replace(point, tip="") for point in chart.points))


def _find_column(mart: MartReport, name: str | None, default: int | None) -> int | None:
    wanted = (name or "").casefold()
    found = (place for place, column in enumerate(mart.columns) if column.casefold() == wanted)
    return next(found, default) if mart.columns else None


def _first_numeric(mart: MartReport, besides: int | None) -> int | None:
    for place in range(len(mart.columns)):
        values = [row[place] for row in mart.rows if place < len(row) and row[place] is not None]
        has_numbers_only = all(isinstance(value, int | float | Decimal) for value in values)
        if place != besides and has_numbers_only and any(is_number(value) for value in values):
            return place
    return None


def _classify(values: Sequence[object]) -> Literal["place", "number", "year", "time"]:
    if values and all(is_number(value) for value in values):
        return "year" if looks_like_years([float(str(value)) for value in values]) else "number"
    return "time" if values and all(to_moment(value) for value in values) else "place"


def _choose_kind(asked: str, x_is: str, values: Sequence[object]) -> Literal["bars", "columns", "line", "scatter"]:
    is_unique = len(set(map(str, values))) == len(values)
    if asked == "bar":
        return "columns" if x_is in ("year", "time") and is_unique and len(values) > 2 else "bars"
    # A line through two values of the same x would zigzag.
    if asked == "line" and is_unique and len(values) > 1:
        return "line"
    return "bars" if x_is == "place" else "scatter"


def _make_point(columns: Sequence[str], row: Sequence[object], x: int, y: int, place: int, x_is: str) -> Point:
    if x_is == "time" and (moment := to_moment(row[x])) is not None:
        position = moment.timestamp()
    else:
        position = float(place) if x_is == "place" else float(str(row[x]))
    lines = [f"{column}: {_shorten(format_value(value), 60)}" for column, value in zip(columns, row, strict=True)]
    more = [f"and {len(lines) - 8} more columns"] if len(lines) > 8 else []
    return Point(label=format_value(row[x]), x=position, y=float(str(row[y])), tip="\n".join(lines[:8] + more))


def _draw_bars(chart: Chart, width: int) -> tuple[Markup, int]:
    """Draw horizontal bars: each with its name before it and its value behind it, so no axis is needed."""
    values = _format_bars([point.y for point in chart.points])
    names = [_fit(point.label, width * 0.4) for point in chart.points]
    left = max(text_width(name) for name in (*names, _fit(chart.x_label, width * 0.4))) + 10
    right = max(text_width(value) for value in values) + 8
    top, pitch, thickness = 26, 24, 16
    height = top + pitch * len(names) + 4
    low, high = min(0.0, *(point.y for point in chart.points)), max(0.0, *(point.y for point in chart.points))
    # A negative bar has its value before it: room for both sides.
    left += right if low < 0 else 0
    frame = _Frame(
        width=width, height=height, left=left, right=right, top=top, bottom=0,
        x_low=low, x_high=high if high > low else low + 1, y_low=0, y_high=1,
    )  # fmt: skip
    zero = frame.x(0)
    parts = [_text(0, 12, _fit(chart.x_label, width * 0.4), "axis-label"), _text(zero, 12, chart.y_label, "axis-label")]
    for place, (point, name, value) in enumerate(zip(chart.points, names, values, strict=True)):
        y = top + place * pitch
        start, end = sorted((zero, frame.x(point.y)))
        parts += [
            _text(0, y + 12.5, name, "category"),
            Markup('<rect class="mark" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
                start, y, round(max(end - start, 1), 1), thickness
            ),
            _text(end + 5 if point.y >= 0 else start - 5, y + 12.5, value, "value", "start" if point.y >= 0 else "end"),
            _hover(0, y - 4, width, pitch, point.tip),
        ]
    parts.append(_line(zero, top - 4, zero, height, "axis"))
    return Markup("").join(parts), height


def _draw_columns(chart: Chart, width: int) -> tuple[Markup, int]:
    frame, parts = _draw_frame(chart, width, with_zero=True, margin=0.5)
    pitch = frame.x(frame.x_low + _smallest_gap(chart)) - frame.x(frame.x_low) if chart.x_is != "time" else 0
    thickness = max(1.0, min(28.0, (pitch or (width - frame.left) / (len(chart.points) + 1)) * 0.8))
    for point in chart.points:
        top, foot = sorted((frame.y(point.y), frame.y(0)))
        x = frame.x(point.x) - thickness / 2
        parts += [
            Markup('<rect class="mark" x="{:.1f}" y="{}" width="{:.1f}" height="{:.1f}"/>').format(
                x, top, thickness, max(foot - top, 0.5)
            ),
            _hover(x, frame.top, thickness, frame.height - frame.top - frame.bottom, point.tip),
        ]
    parts.append(_line(frame.left, frame.y(0), width - frame.right, frame.y(0), "axis"))
    return Markup("").join(parts), int(frame.height)


def _draw_line(chart: Chart, width: int) -> tuple[Markup, int]:
    frame, parts = _draw_frame(chart, width, with_zero=False, margin=0)
    places = [(frame.x(point.x), frame.y(point.y)) for point in chart.points]
    path = "M" + "L".join(f"{x},{y}" for x, y in places)
    parts.append(Markup('<path class="line" d="{}"/>').format(path))
    last = len(places) - 1
    for place, (point, (x, y)) in enumerate(zip(chart.points, places, strict=True)):
        # Each point answers to the pointer half-way to its neighbours, over the whole height.
        before = frame.left if place == 0 else (places[place - 1][0] + x) / 2
        after = width - frame.right if place == last else (places[place + 1][0] + x) / 2
        dot = Markup('<circle class="dot" cx="{}" cy="{}" r="3.5"/>').format(x, y)
        area = _hover(before, frame.top, after - before, frame.height - frame.top - frame.bottom, point.tip)
        parts.append(Markup('<g class="hover">{}{}</g>').format(area, dot))
    return Markup("").join(parts), int(frame.height)


def _draw_scatter(chart: Chart, width: int) -> tuple[Markup, int]:
    frame, parts = _draw_frame(chart, width, with_zero=False, margin=0.03)
    for point in chart.points:
        dot = Markup('<circle class="point" cx="{}" cy="{}" r="4"{}/>')
        parts.append(dot.format(frame.x(point.x), frame.y(point.y), _tip(point.tip)))
    return Markup("").join(parts), int(frame.height)


def _draw_frame(chart: Chart, width: int, *, with_zero: bool, margin: float) -> tuple[_Frame, list[Markup]]:
    """Draw the axes with their ticks, grid and labels; *margin* is the room next to the outer values.

    For columns it is in units of the smallest gap between two values, else a share of the whole.
    """
    height = 300 if width > 400 else 250
    y_ticks = nice_ticks(*_y_range(chart, with_zero), 5)
    y_step = y_ticks[1] - y_ticks[0]
    y_names = [format_tick(tick, y_step, max(map(abs, y_ticks))) for tick in y_ticks]
    left = max(text_width(name) for name in y_names) + 8
    x_low, x_high = _x_range(chart, margin)
    frame = _Frame(
        width=width, height=height, left=left, right=14, top=28, bottom=44,
        x_low=x_low, x_high=x_high, y_low=y_ticks[0], y_high=y_ticks[-1],
    )  # fmt: skip
    parts = [_text(0, 12, chart.y_label, "axis-label")]
    for tick, name in zip(y_ticks, y_names, strict=True):
        parts.append(_line(left, frame.y(tick), width - frame.right, frame.y(tick), "grid"))
        parts.append(_text(left - 6, frame.y(tick) + 4, name, "tick", "end"))
    for place, name in _x_ticks(chart, frame):
        anchor = _anchor(place, text_width(name), width)
        parts.append(_line(place, height - frame.bottom, place, height - frame.bottom + 4, "axis"))
        parts.append(_text(place, height - frame.bottom + 17, name, "tick", anchor))
    parts.append(_text(left + (width - left) / 2, height - 6, chart.x_label, "axis-label", "middle"))
    return frame, parts


def _y_range(chart: Chart, with_zero: bool) -> tuple[float, float]:
    low, high = min(point.y for point in chart.points), max(point.y for point in chart.points)
    # Starting at zero is the honest default; a line far above it would lose its shape there.
    if with_zero or (chart.kind == "line" and 0 <= low < high * 0.5):
        return min(low, 0.0), max(high, 0.0)
    return low, high


def _x_range(chart: Chart, margin: float) -> tuple[float, float]:
    low, high = min(point.x for point in chart.points), max(point.x for point in chart.points)
    room = margin * (_smallest_gap(chart) if chart.kind == "columns" else high - low)
    return widen(low - room, high + room)


def _smallest_gap(chart: Chart) -> float:
    places = sorted({point.x for point in chart.points})
    gaps = [after - before for before, after in pairwise(places)]
    return min(gaps, default=1.0)


def _x_ticks(chart: Chart, frame: _Frame) -> list[tuple[float, str]]:
    room = frame.width - frame.left - frame.right
    if chart.x_is == "place":
        widest = max(text_width(_shorten(point.label, 14)) for point in chart.points)
        # As many as fit, evenly spread, with the first.
        stride = math.ceil(len(chart.points) / max(2, int(room / (widest + 16))))
        return [(frame.x(point.x), _shorten(point.label, 14)) for point in chart.points[::stride]]
    if chart.x_is == "time":
        return _name_moments(frame, max(2, int(room / 90)))
    count = max(2, int(room / 70))
    ticks = nice_ticks(frame.x_low, frame.x_high, count)
    step = ticks[1] - ticks[0]
    inside = [tick for tick in ticks if frame.x_low <= tick <= frame.x_high]
    if chart.x_is == "year":  # it has no fractions and no thousands separator
        return [(frame.x(tick), f"{tick:.0f}") for tick in inside if tick == int(tick)]
    return [(frame.x(tick), format_tick(tick, step, max(map(abs, ticks)))) for tick in inside]


def _name_moments(frame: _Frame, count: int) -> list[tuple[float, str]]:
    low, high = max(frame.x_low, _FIRST_MOMENT), min(frame.x_high, _LAST_MOMENT)
    form = "%Y-%m-%d" if high - low > 86400 * 2 else "%m-%d %H:%M"
    places = [low + (high - low) * number / (count - 1) for number in range(count)]
    return [(frame.x(place), datetime.fromtimestamp(place, UTC).strftime(form)) for place in places]


def text_width(text: str) -> float:
    """Estimate the width of *text* in CSS pixels; only a browser knows it exactly."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return _FONT * (0.58 * (len(text) - wide) + 1.05 * wide)


def _fit(text: str, width: float) -> str:
    while len(text) > 2 and text_width(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _format_bars(values: Sequence[float]) -> list[str]:
    """Return the labels of bars, all with as many decimals as the one that needs most, up to three."""
    if any(abs(value) >= 1e15 for value in values):
        return [f"{value:.4g}" for value in values]
    rounded = [round(value, 3 if abs(value) < 1000 else 0) for value in values]
    decimals = next(count for count in range(4) if all(round(value, count) == value for value in rounded))
    return [f"{value:,.{decimals}f}" for value in rounded]


def _anchor(x: float, width: float, limit: float) -> str:
    return "end" if x + width / 2 > limit else "start" if x - width / 2 < 0 else "middle"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, style, anchor, text)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def _hover(x: float, y: float, width: float, height: float, tip: str) -> Markup:
    return Markup('<rect class="area" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"{}/>').format(
        x, y, max(width, 0), height, _tip(tip)
    )


def _tip(tip: str) -> Markup:
    return Markup(' data-tip="{}"').format(tip) if tip else Markup("")
