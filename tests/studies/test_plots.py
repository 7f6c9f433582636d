"""Plots of reports: deterministic SVG with text, and series that stay distinguishable where they overlap."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fastbert.report.report_page import write_plot
from fastbert.studies.ablate.ablation_plots import plot_budgets, plot_curves
from fastbert.studies.ablate.analysis import Measure, Point, compare_variants
from fastbert.studies.shared.plots import LABEL_GAP, label_ends, plot_settings, series_style


def test_styles_of_series_differ() -> None:
    styles = [series_style(number) for number in range(280)]
    assert len({str(style) for style in styles}) == 280
    for a, b in pairwise(styles):  # neighbors differ in each of the three
        assert all(a[name] != b[name] for name in ("color", "marker", "linestyle"))


@settings(max_examples=50)
@given(st.lists(st.floats(-2, 3), min_size=1, max_size=13))
def test_labels_at_the_ends_do_not_overlap(values) -> None:
    panel = Figure().subplots()
    panel.set_ylim(-1, 2)
    label_ends(panel, [(value, f"{number}", "C0") for number, value in enumerate(values)])
    heights = [text.get_position()[1] for text in panel.texts]
    gaps = [b - a for a, b in pairwise(heights)]
    assert all(gap >= LABEL_GAP - 1e-9 for gap in gaps) and max(heights) <= 1
    assert [float(values[int(text.get_text())]) for text in panel.texts] == sorted(values)
    lowest = min((min(values) + 1) / 3, 1 - LABEL_GAP * (len(values) - 1))
    assert min(heights) >= lowest - 1e-9  # labels move up first
    if len(values) == 1 and -1 <= values[0] <= 2:
        assert heights[0] == pytest.approx((values[0] + 1) / 3)  # at the value itself where there is room


def test_equal_curves_are_all_visible(tmp_path) -> None:
    """Each has a dash pattern of its own, a label and an entry of the legend; the file is the same every time."""
    curve = [Point(step / 3, step, 2.0 * step, 3.0 * step, 9.0 - step) for step in (1, 2, 3)]
    measure = Measure("loss", False, {name: {0: curve} for name in ("a & b", "$c$", "d")})
    texts = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_plot(tmp_path / name / "curves.svg", plot_curves, measure, None)
        texts.append((tmp_path / name / "curves.svg").read_text())
    assert texts[0] == texts[1]
    thick = [
        re.search("stroke: (#[0-9a-f]{6})", line)[1] + str(re.findall("stroke-dasharray: ([^;]*)", line))
        for line in re.findall('<path d="M [^"]*"[^>]*style="fill: none; stroke[^>]*', texts[0])
        if "stroke-width: 1.5" in line
    ]
    assert len(set(thick)) == 3 and len(thick) >= 9  # in three panels
    for name in ("a &amp; b", "$c$", "d"):
        assert texts[0].count(f">{name}</text>") == 2


def test_fractions_over_budgets_are_those_of_the_table() -> None:
    """A line through the medians, hollow where undecided; a variant that never reaches the target has none."""

    def curve(*values: float) -> list[Point]:
        return [Point(n / 3, n, 2.0 * n, 3.0 * n, value) for n, value in enumerate(values, 1)]

    curves = {
        "base": [curve(9.0, 6.0, 3.0), curve(9.0, 6.01, 3.01), curve(9.0, 6.02, 3.02)],
        "sooner": [curve(6.0, 3.0, 2.0), curve(6.01, 3.01, 2.02), curve(6.02, 3.02, 2.01)],
        "late": [curve(9.5, 6.5, 2.0), curve(9.6, 5.0, 2.02), curve(9.6, 6.4, 2.01)],
        "worse": [curve(9.8, 9.7, 9.61), curve(9.8, 9.7, 9.63), curve(9.8, 9.7, 9.62)],
    }
    measure = Measure("loss", False, {name: dict(enumerate(seeds)) for name, seeds in curves.items()})
    compared = {point: compare_variants(measure.until(point), False, measure) for point in measure.fractions[1:]}
    figure = plot_budgets(compared)
    late = [50 * (2 + 0.38 / 4.39), 100 / 3 * (2 + 3.38 / 4.39)]
    for panel in figure.axes:
        lines = [line for line in panel.lines if line.get_linestyle() not in ("None", ":") and len(line.get_xdata())]
        found = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
        budgets = pytest.approx([200 / 3, 100])
        assert found == [(budgets, pytest.approx([50, 200 / 3])), (budgets, pytest.approx(late))]
        fills = [line.get_markerfacecolor() == "white" for line in panel.lines if line.get_zorder() == 3]
        assert fills == [True, False, True, False]  # at two thirds the seeds of `late` differ, so the noise is larger
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sooner", "late"]


def test_settings_are_offset(tmp_path) -> None:
    figure = plot_settings({"cola": {"1": {"a": [5.0], "b": [5.0]}, "2": {"a": [5.0], "b": [5.0]}}}, {"cola": "acc"})
    lines = {
        line.get_label(): line.get_xdata() for line in figure.axes[0].lines if not line.get_label().startswith("_")
    }
    assert len(lines) == 2 and all(a != b for a, b in zip(lines["a"], lines["b"], strict=True))
