"""A picture of a matrix of affinities: a heat map with its values."""

from pathlib import Path
from typing import Any

import numpy as np

from fastbert.files import atomic_file
from fastbert.finetuning.affinity.results import scale_of
from fastbert.streams import echo

PICTURE = "affinity.png"


def plot_affinity(path: Path, results: dict[str, Any]) -> Path | None:
    """Plots the affinities between tasks. Colors end at the largest one; the effect of a task on itself, which is not
    used for groups and much larger, is written in gray without a color.

    Returns:
        The file; None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        echo("matplotlib is not installed: there is no picture; affinity.json has the values")
        return None
    names, power = results["tasks"], scale_of(results["affinity"])
    values = np.array(results["affinity"]) * 10.0**power
    errors = np.array(results["standard_error"], dtype=float) * 10.0**power
    own = np.eye(len(names), dtype=bool)
    bound = np.abs(values[~own]).max() or 1.0
    side = 1.6 + 0.95 * len(names)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained", dpi=150)
    panel = figure.subplots()
    image = panel.imshow(np.where(own, np.nan, values), cmap="RdBu", vmin=-bound, vmax=bound)
    for (row, column), value in np.ndenumerate(values):
        dark = not own[row, column] and abs(value) > 0.6 * bound
        color = "0.5" if own[row, column] else "white" if dark else "black"
        panel.text(column, row - 0.08, f"{value:.2f}", ha="center", va="center", color=color, fontsize=10)
        if np.isfinite(errors[row, column]):
            text = f"± {errors[row, column]:.2f}"
            panel.text(column, row + 0.22, text, ha="center", va="center", color=color, fontsize=7)
    panel.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(names)), names)
    panel.set(xlabel="loss of", ylabel="step on")
    panel.set_title(f"affinity x 1e{power}, {results['probes']} probes\n{results['model']}", loc="left", fontsize=10)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panel, shrink=0.8)
    bar.set_label("lower loss (blue), higher loss (red)")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    return path
