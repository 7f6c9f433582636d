"""The drawings of a report, as PNG: scores over seeds, and differences with their intervals."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Panel -> name -> one score a seed."""


def plot_scores(path: Path, panels: Scores, labels: Mapping[str, str]) -> None:
    """A panel each, its axis labelled by `labels`: every seed a point, the median a bar."""
    names = list(dict.fromkeys(name for scores in panels.values() for name in scores))
    figure, axes = panels_of(len(panels), min(1.4 + 0.55 * len(names), 5.0))
    for panel, (title, scores) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            if values := scores.get(name):
                spread = [place + 0.16 * (2 * (at + 0.5) / len(values) - 1) for at in range(len(values))]
                panel.plot(spread, values, "o", color=f"C{place}", alpha=0.6, markersize=5, markeredgewidth=0)
                panel.hlines(statistics.median(values), place - 0.3, place + 0.3, color=f"C{place}", linewidth=2.5)
        tilted = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
        panel.set_xticks(range(len(names)), names, fontsize=8, **tilted)
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.set_ylabel(labels[title], fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        style_axes(panel, "y")
    save(figure, path)


def plot_settings(path: Path, panels: Mapping[str, Mapping[str, Scores]], labels: Mapping[str, str]) -> None:
    """A panel each: settings from left to right; for each name every seed a point and a line through the medians.

    Args:
        panels: panel -> setting -> name -> one score a seed.
    """
    most = max(len(settings) for settings in panels.values())
    figure, axes = panels_of(len(panels), 1.6 + 0.62 * most)
    for panel, (title, settings) in zip(axes, panels.items(), strict=True):
        names = list(dict.fromkeys(name for scores in settings.values() for name in scores))
        for number, name in enumerate(names):
            shift = 0.12 * (number - (len(names) - 1) / 2)
            found = [(place, scores[name]) for place, scores in enumerate(settings.values()) if scores.get(name)]
            for place, values in found:
                panel.plot([place + shift] * len(values), values, "o", color=f"C{number}", alpha=0.35, markersize=4)
            medians = [statistics.median(values) for _, values in found]
            places = [place + shift for place, _ in found]
            panel.plot(places, medians, ".-", color=f"C{number}", linewidth=1.5, label=name)
        panel.set_xticks(range(len(settings)), list(settings), rotation=30, ha="right", fontsize=7)
        panel.set_ylabel(labels[title], fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        style_axes(panel, "both")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def plot_differences(path: Path, lines: Sequence[tuple[str, float, float | None, float | None]], label: str) -> None:
    """A line each, from above: the mean difference as a point, its interval as a bar, zero dotted.

    Args:
        lines: (name, mean, low, high); without an interval only the point.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.1 + 0.34 * len(lines)), layout="constrained", dpi=150)
    panel = figure.subplots()
    for place, (_, mean, low, high) in enumerate(lines):
        if low is not None:
            panel.hlines(place, low, high, color="C0", linewidth=2)
        panel.plot(mean, place, "o", color="C0", markersize=5)
    panel.axvline(0, color="0.35", linestyle=":")
    panel.set_yticks(range(len(lines)), [name for name, *_ in lines], fontsize=8)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.set_xlabel(label, fontsize=9)
    style_axes(panel, "x")
    save(figure, path)


def panels_of(count: int, width: float) -> tuple[Any, list[Any]]:
    """`count` panels, at most four in a row."""
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = -(-count // columns)
    # A Figure of its own, without pyplot: no display is needed and no global state is left. PNG is drawn by Agg.
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


def save(figure: Any, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
