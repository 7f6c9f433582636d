"""Figures of matplotlib with panels below each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT, BOTTOM = 0.9, 0.15, 0.55  # inches, for the labels of the ticks and the titles of the axes
BETWEEN = 0.3  # inches, for a power of ten above a panel


def panels_below_each_other(
    width: float, height: float, ratios: Sequence[float], top: float, dpi: float = 100
) -> tuple["Figure", Sequence["Axes"]]:
    """Returns a figure of `width` x `height` inches, and its panels, whose heights are in proportion to `ratios`.

    The margins are fixed: a layout that matplotlib computes from the texts (constrained) takes 30 to 45 % of the time
    of a plot, and every run ends with plots. A Figure without pyplot needs no display and leaves no global state.

    Args:
        top: inches above the first panel.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi)
    inner = height - BOTTOM - top
    panel = (inner - BETWEEN * (len(ratios) - 1)) / len(ratios)
    grid = {"left": LEFT / width, "right": 1 - RIGHT / width, "bottom": BOTTOM / height, "top": 1 - top / height}
    grid["hspace"] = BETWEEN / panel
    grid["height_ratios"] = list(ratios)
    panels = figure.subplots(len(ratios), sharex=True, squeeze=False, gridspec_kw=grid)[:, 0]
    for axes in panels:
        axes.yaxis.set_label_coords(-(LEFT - 0.2) / (width - LEFT - RIGHT), 0.5)  # otherwise found from the ticks
    return figure, panels
