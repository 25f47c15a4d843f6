"""What the charts show."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise.report.charts import draw_chart, plan_chart
from tests.unit.report.reports import PATIENTLY, make_mart


def test_text_is_drawn_as_bars_in_the_order_of_the_rows() -> None:
    chart = plan_chart(make_mart(["player", "hits"], [["Rose", 4256], ["Cobb", 4189]]))

    assert chart is not None
    assert chart.kind == "bars"
    assert [(point.label, point.y) for point in chart.points] == [("Rose", 4256), ("Cobb", 4189)]


def test_bars_by_year_are_columns_on_a_clock() -> None:
    chart = plan_chart(make_mart(["year", "players"], [[1936, 5], [1937, 3], [1939, 4]]))

    assert chart is not None
    assert (chart.kind, chart.x_is) == ("columns", "year")
    assert "1,936" not in draw_chart(chart, 520)[0]


def test_a_line_that_would_zigzag_is_drawn_as_points() -> None:
    rows = [[2000, 1], [2000, 2], [2001, 3]]

    chart = plan_chart(make_mart(["year", "pay"], rows, chart="line"))

    assert chart is not None
    assert chart.kind == "scatter"


def test_a_line_is_drawn_from_left_to_right_whatever_the_order_of_the_rows() -> None:
    chart = plan_chart(make_mart(["day", "n"], [["2026-01-02", 2], ["2026-01-01", 1]], chart="line"))

    assert chart is not None
    assert (chart.kind, chart.x_is, [point.y for point in chart.points]) == ("line", "time", [1, 2])


def test_the_named_columns_are_drawn_whatever_their_case() -> None:
    chart = plan_chart(make_mart(["a", "B", "c"], [["x", 1, 2]], x="A", y="C"))

    assert chart is not None
    assert (chart.x_label, chart.y_label) == ("a", "c")


def test_a_chart_counts_what_it_leaves_out() -> None:
    rows: list[list[Any]] = [[f"player {number}", number] for number in range(30)]
    rows += [["unknown", None], ["impossible", float("nan")]]

    chart = plan_chart(make_mart(["player", "hits"], rows, total_rows=500))

    assert chart is not None
    assert (len(chart.points), chart.left_out) == (25, 475)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [([], []), (["a"], []), (["a"], [["x"]]), (["a", "b"], [["x", "y"]]), (["a", "b"], [["x", None]])],
)
def test_a_mart_without_numbers_has_no_chart(columns: list[str], rows: list[list[Any]]) -> None:
    assert plan_chart(make_mart(columns, rows)) is None


def test_decimals_are_drawn() -> None:
    assert plan_chart(make_mart(["x", "y"], [["a", Decimal("1.50")]])) is not None


def test_labels_of_bars_have_the_same_decimals() -> None:
    chart = plan_chart(make_mart(["pitcher", "era"], [["a", 2.35], ["b", 2.391], ["c", 12.0]]))

    assert chart is not None
    svg = draw_chart(chart, 520)[0]
    assert all(f">{label}<" in svg for label in ("2.350", "2.391", "12.000"))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.decimals(),
    st.text(max_size=40),
    st.dates(),
    st.datetimes(),
    st.sampled_from([1936, 2024, "2024-01-01", "0001-01-01T00:00:00+14:00", "2024-13-01", 10**400, -0.0, 5e-324]),
)


@given(
    rows=st.lists(st.lists(VALUES, min_size=1, max_size=3), max_size=12),
    chart=st.sampled_from(["bar", "line", "scatter"]),
    names=st.tuples(st.text(max_size=20), st.text(max_size=20)),
)
@settings(PATIENTLY, max_examples=300)
def test_no_data_breaks_a_chart_or_leaves_it_with_a_place_that_is_not_a_number(
    rows: list[list[Any]], chart: Any, names: tuple[str, str]
) -> None:
    planned = plan_chart(make_mart([*names], rows, chart=chart))

    for width in (520, 320) if planned else ():
        svg = draw_chart(planned, width)[0]
        places = re.findall(r' (?:x|y|cx|cy|x1|y1|x2|y2|width|height|d)="([^"]*)"', svg)
        assert not [place for place in places if re.search(r"nan|inf", place)]
