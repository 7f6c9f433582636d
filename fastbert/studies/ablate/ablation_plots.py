"""Plots of an ablation's report: a measure over steps, FLOPs and minutes; fractions of the baseline's cost at the
end of the budget and at smaller ones."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastbert.studies.ablate.analysis import Curve, Measure, VariantComparison
from fastbert.studies.ablate.options import UNITS
from fastbert.studies.shared.plots import COLORS, MARKERS, add_legend, label_ends, new_panels, series_style, style_axes

LABELS = {"steps": "steps", "flops": "FLOPs", "minutes": "minutes of training"}


def plot_curves(measure: Measure, floor: float | None) -> Any:
    """A panel for each unit: every seed a thin line, the medians a thick one that is labeled at its end, the baseline's
    final median dotted, and `floor`, the unigram entropy for a loss in nats, dashed."""
    figure, panels = new_panels(len(UNITS), 4.2)
    first = next(iter(measure.curves))
    for panel, unit in zip(panels, UNITS, strict=True):
        ends = []
        for number, (name, curves) in enumerate(measure.curves.items()):
            style = series_style(number)
            for curve in curves.values():
                line = [(getattr(point, unit), point.value) for point in curve]
                panel.plot(*zip(*line, strict=True), color=style["color"], alpha=0.3, linewidth=0.8)
            if curves:
                line = median_curve(list(curves.values()), unit)
                panel.plot(*zip(*line, strict=True), **style, markersize=5, label=name)
                ends.append((line[-1][1], name, style["color"]))
        finals = measure.finals(first).values()
        panel.axhline(statistics.median(finals), color="0.35", linestyle=":", linewidth=1)
        if floor is not None:
            panel.axhline(floor, color="0.6", linestyle="--", linewidth=1)
        panel.set_xlim(left=0)
        panel.set_xlabel(LABELS[unit], fontsize=9)
        style_axes(panel, "both")
    label_ends(panels[-1], ends)
    panels[0].set_ylabel(measure.name, fontsize=9)
    add_legend(figure, panels)
    return figure


def median_curve(curves: Sequence[Curve], unit: str) -> list[tuple[float, float]]:
    """(Median cost, median value) at each point that any seed has."""
    steps = sorted({point.steps for curve in curves for point in curve})
    found = [[point for curve in curves for point in curve if point.steps == count] for count in steps]
    return [
        (statistics.median(getattr(p, unit) for p in points), statistics.median(p.value for p in points))
        for points in found
    ]


def plot_fractions(measures: Mapping[str, Sequence[VariantComparison]]) -> Any:
    """A panel for each measure: for each variant the fraction of the baseline's steps, FLOPs and minutes, every seed a
    point, the median a bar; hollow where undecided. A text counts the seeds that have not reached it."""
    figure, panels = new_panels(len(measures), 4.2)
    for panel, (title, rows) in zip(panels, measures.items(), strict=True):
        _plot_rows(panel, rows)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.legend(*_unit_legend(), frameon=False, fontsize=8, ncols=len(UNITS), loc="outside lower center")
    return figure


def _plot_rows(panel: Any, rows: Sequence[VariantComparison]) -> None:
    for row, variant in enumerate(rows):
        for number, unit in enumerate(UNITS):
            height = row + 0.22 * (number - 1)
            values = variant.fractions[unit].values if variant.fractions else ()
            values = [100 * value for value in values if math.isfinite(value)]
            style = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": "", "markersize": 4}
            fill = COLORS[number] if variant.decided else "none"
            panel.plot(values, [height] * len(values), markerfacecolor=fill, **style)
            if variant.fractions and math.isfinite(median := 100 * variant.fractions[unit].median):
                panel.vlines(median, height - 0.09, height + 0.09, color=COLORS[number], linewidth=2)
        missed = sum(map(math.isinf, variant.fractions["steps"].values)) if variant.fractions else 0
        if missed:
            text = f"not reached: {missed} of {len(variant.seeds)} seeds"
            height = row if missed == len(variant.seeds) else row - 0.36
            style = {"fontsize": 7, "color": "0.35", "verticalalignment": "center"}
            panel.text(0.02, height, text, **style, transform=panel.get_yaxis_transform())
    panel.axvline(100, color="0.35", linestyle=":", linewidth=1)
    panel.set_yticks(range(len(rows)), [variant.variant for variant in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_xlabel("% of the baseline's cost", fontsize=9)
    style_axes(panel, "x")


def plot_budgets(compared: Mapping[float, Sequence[VariantComparison]]) -> Any:
    """A panel for each unit: the fraction of the baseline's cost over the budget, for each variant. Every seed is a
    small point, the medians are a line; its markers are hollow where the verdict is undecided.

    Args:
        compared: point, as a fraction of the budget -> comparison with the baseline's values there.
    """
    figure, panels = new_panels(len(UNITS), 4.2)
    for panel, unit in zip(panels, UNITS, strict=True):
        ends = []
        # The first variant of each comparison is the baseline.
        for number, rows in enumerate(list(zip(*compared.values(), strict=True))[1:], start=1):
            style = series_style(number)
            line = []
            for point, row in zip(compared, rows, strict=True):
                if not row.fractions:
                    continue
                fraction = row.fractions[unit]
                values = [100 * value for value in fraction.values if math.isfinite(value)]
                small = {"color": style["color"], "marker": ".", "linestyle": "", "alpha": 0.35}
                panel.plot([100 * point] * len(values), values, **small)
                if math.isfinite(fraction.median):
                    line.append((100 * point, 100 * fraction.median))
                    fill = style["color"] if row.decided else "white"
                    panel.plot(*line[-1], **style | {"linestyle": ""}, markerfacecolor=fill, markersize=5, zorder=3)
            if line:
                panel.plot(*zip(*line, strict=True), color=style["color"], linestyle=style["linestyle"])
                panel.plot([], [], **style, markersize=5, label=rows[0].variant)
                ends.append((line[-1][1], rows[0].variant, style["color"]))
        panel.axhline(100, color="0.35", linestyle=":", linewidth=1)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("% of the budget", fontsize=9)
        panel.set_title(LABELS[unit], loc="left", fontsize=10, fontweight="bold")
        style_axes(panel, "both")
    label_ends(panels[-1], ends)
    panels[0].set_ylabel("% of the baseline's cost", fontsize=9)
    add_legend(figure, panels)
    return figure


def _unit_legend() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker=MARKERS[number], linestyle="", color=COLORS[number], markersize=4)
        for number in range(len(UNITS))
    ]
    return marks, [LABELS[unit] for unit in UNITS]
