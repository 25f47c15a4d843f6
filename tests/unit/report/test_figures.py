"""Figures as people read them."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewise.report.figures import (
    format_bytes,
    format_seconds,
    format_tick,
    humanise,
    nice_ticks,
    time_ticks,
    to_moment,
)
from tests.unit.report.reports import PATIENTLY


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0853, "85 ms"),
        (0.0999, "0.10 s"),
        (0.5, "0.50 s"),
        (0.999, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (4800, "1 h 20 min"),
        (-2, "−2.0 s"),
    ],
)
def test_seconds_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_500, "100 kB"), (999_600, "1.0 MB"), (14_200_000, "14.2 MB")],
)
def test_bytes_are_in_decimal_units(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_a_tick_has_the_decimals_that_its_step_needs() -> None:
    assert format_tick(0.25, 0.25, 1) == "0.25"
    assert format_tick(5000, 1000, 9000) == "5,000"
    assert format_tick(500_000, 500_000, 2_000_000) == "0.5M"
    assert format_tick(0, 500_000, 2_000_000) == "0"
    assert float(format_tick(2e-310, 1e-310, 5e-310)) == 0  # nearer to 0 than any power of ten that is a float


# A step cannot be divided out of numbers that a float holds with a few bits only.
_MEASURES = st.floats(-1e299, 1e299, allow_subnormal=False)


@given(_MEASURES, _MEASURES, st.integers(2, 10))
@PATIENTLY
def test_ticks_enclose_what_they_measure(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))

    ticks = nice_ticks(low, high, count)

    unseen = (high - low) * 1e-12
    assert ticks[0] <= low + unseen
    assert ticks[-1] >= high - unseen
    assert 2 <= len(ticks) <= 4 * count + 1


@pytest.mark.parametrize("seconds", [0.001, 0.4, 9, 61, 700, 5_000, 90_000, 2_000_000])
def test_the_axis_of_a_batch_has_few_ticks_whatever_its_length(seconds: float) -> None:
    assert 1 <= len(time_ticks(seconds, 8)) <= 9


def test_a_unit_at_the_end_of_a_column_name_is_shown_as_one() -> None:
    assert humanise("payroll_usd") == "payroll (USD)"
    assert humanise("home_runs") == "home runs"
    assert humanise("usd") == "usd"


def test_only_text_of_a_date_is_a_moment() -> None:
    assert to_moment("2026-01-03") == to_moment(date(2026, 1, 3))
    assert to_moment("2026-13-03") is None
    assert to_moment("12345678901") is None
