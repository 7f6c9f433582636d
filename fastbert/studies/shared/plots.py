"""Plots of a report, as figures: scores over seeds, and differences with their intervals.

Series that overlap stay distinguishable: each has a color, a marker and a dash pattern, and a label at its end.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Panel -> name -> one score for each seed."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#444444")  # after Okabe and Ito
MARKERS, DASHES = "os^Dv*Pd", ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
LABEL_GAP = 0.075  # distance of two labels at the ends of lines, relative to the height of a panel


def series_style(number: int) -> dict[str, Any]:
    """Color, marker and dash pattern of a series; the combination is unique for 280 series."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def plot_scores(panels: Scores, labels: Mapping[str, str]) -> Any:
    """One panel for each entry of `panels`, its axis labeled by `labels`: every seed a point, the median a bar."""
    names = list(dict.fromkeys(name for scores in panels.values() for name in scores))
    figure, axes = new_panels(len(panels), min(1.4 + 0.55 * len(names), 5.0))
    for panel, (title, scores) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(names):
            style = series_style(number) | {"linestyle": ""}
            if values := scores.get(name):
                spread = [number + 0.16 * (2 * (seed + 0.5) / len(values) - 1) for seed in range(len(values))]
                panel.plot(spread, values, **style, alpha=0.6, markersize=5, markeredgewidth=0)
                median = statistics.median(values)
                panel.hlines(median, number - 0.3, number + 0.3, color=style["color"], linewidth=2.5)
        tilted = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
        panel.set_xticks(range(len(names)), names, fontsize=8, **tilted)
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.set_ylabel(labels[title], fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        style_axes(panel, "y")
    return figure


def plot_settings(panels: Mapping[str, Mapping[str, Scores]], labels: Mapping[str, str]) -> Any:
    """One panel for each entry: settings from left to right; for each name, the seeds and a line through the medians.

    Args:
        panels: panel -> setting -> name -> one score for each seed.
    """
    most = max(len(settings) for settings in panels.values())
    figure, axes = new_panels(len(panels), 2.2 + 0.62 * most)
    for panel, (title, settings) in zip(axes, panels.items(), strict=True):
        names = list(dict.fromkeys(name for scores in settings.values() for name in scores))
        for number, name in enumerate(names):
            style = series_style(number)
            offset = 0.12 * (number - (len(names) - 1) / 2)
            found = [(index, scores[name]) for index, scores in enumerate(settings.values()) if scores.get(name)]
            for index, values in found:
                points = style | {"linestyle": ""}
                panel.plot([index + offset] * len(values), values, **points, alpha=0.35, markersize=4)
            medians = [statistics.median(values) for _, values in found]
            panel.plot([index + offset for index, _ in found], medians, **style, markersize=5, label=name)
        panel.set_xticks(range(len(settings)), list(settings), rotation=30, ha="right", fontsize=7)
        panel.set_ylabel(labels[title], fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        style_axes(panel, "both")
    add_legend(figure, axes)
    return figure


def plot_differences(lines: Sequence[tuple[str, float, float | None, float | None]], label: str) -> Any:
    """One row for each entry, from top to bottom: the mean difference as a point, its interval as a bar, zero dotted.

    Args:
        lines: (name, mean, low, high); without an interval only the point.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.1 + 0.34 * len(lines)), layout="constrained", dpi=150)
    panel = figure.subplots()
    for row, (_, mean, low, high) in enumerate(lines):
        if low is not None:
            panel.hlines(row, low, high, color=COLORS[0], linewidth=2)
        panel.plot(mean, row, "o", color=COLORS[0], markersize=5)
    panel.axvline(0, color="0.35", linestyle=":")
    panel.set_yticks(range(len(lines)), [name for name, *_ in lines], fontsize=8)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.set_xlabel(label, fontsize=9)
    style_axes(panel, "x")
    return figure


# --- parts of a figure


def new_panels(count: int, width: float) -> tuple[Any, list[Any]]:
    """A figure and its `count` panels of `width` inches, at most four in a row."""
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = -(-count // columns)
    # A Figure without pyplot needs no display and leaves no global state.
    figure = Figure(figsize=(max(4.0, columns * max(width, 2.4)), 3.0 * rows), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def style_axes(panel: Any, grid: str) -> None:
    panel.grid(color="0.9", linewidth=0.7, axis=grid)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def add_legend(figure: Any, panels: Sequence[Any]) -> None:
    """Adds one legend for all panels below them, where it covers no line."""
    handles = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() // 2))
    style = {"frameon": False, "fontsize": 8, "ncols": columns, "handlelength": 4, "loc": "outside lower center"}
    figure.legend(handles.values(), handles.keys(), **style)


def label_ends(panel: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes a label to the right of each line, as near to its last value as the other labels allow.

    Args:
        ends: (last value, label, color) of each line; the limits of the panel must already be set.
    """
    low, high = panel.get_ylim()
    gap = min(LABEL_GAP, 1 / max(len(ends), 1))
    heights, last = [], -gap
    ordered = sorted(ends)
    for value, *_ in ordered:
        heights.append(last := max((value - low) / (high - low), last + gap))
    limit = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - gap
    for height, (_, label, color) in zip(heights, ordered, strict=True):
        position = {"transform": panel.transAxes, "verticalalignment": "center"}
        panel.text(1.02, height, label, color=color, fontsize=8, **position)
