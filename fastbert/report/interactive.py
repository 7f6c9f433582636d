"""The interactive curves of a page: data for curves.js, its controls, and plotly's library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.errors import printable
from fastbert.report.curves import AXES, curve, further_metrics
from fastbert.report.page import script_json
from fastbert.report.runs import Run
from fastbert.training.splits import named_splits, record_split

CONTROLS = f"""<div class="controls" id="controls">
<label>x axis <select id="axis">{"".join(f'<option value="{name}">{title}</option>' for name, title in AXES.items())}
</select></label>
<label><input type="checkbox" id="logx"> logarithmic x</label>
<label><input type="checkbox" id="logy"> logarithmic loss</label>
<label>smoothing <input type="range" id="smoothing" min="0" max="100" value="10">
<output id="smoothed"></output></label>
<button type="button" id="all">show all</button>
<button type="button" id="none">hide all</button>
</div>
<div id="curves"></div>
<noscript><p class="warning">The curves need JavaScript.</p></noscript>
<p class="faint">Click a name in the legend to hide or show a run, double-click it to show that run alone. Drag to zoom
into all panels, double-click to zoom out. Thin lines are the logged losses, thick lines the smoothed ones.</p>"""


def curve_data(runs: Sequence[Run]) -> dict[str, Any]:
    """The curves of the runs, grouped by panel, for curves.js."""
    panels = [_panel(runs, "train", "loss", "training loss"), _panel(runs, "validation", "loss", "validation loss")]
    panels += [
        _panel(runs, "validation", name, f"validation {name.replace('_', ' ')}") for name in further_metrics(runs)
    ]
    others = dict.fromkeys(name for run in runs for name in named_splits(run.records))
    panels[2:2] = [_panel(runs, record_split(name), "loss", f"validation loss of {name}") for name in others]
    return {
        "runs": [_plain_text(run.name) for run in runs],
        "axes": AXES,
        "panels": [panel for panel in panels if panel["curves"]],
        "baseline": baseline(runs),
    }


def baseline(runs: Sequence[Run]) -> float | None:
    """The unigram entropy, if it is the same for all runs and their losses can be compared with it."""
    found = {run.summary["unigram_entropy"] for run in runs if run.summary and run.summary.get("loss_in_nats")}
    comparable = all(run.summary.get("loss_in_nats") for run in runs if run.summary)
    return found.pop() if len(found) == 1 and comparable else None


def _panel(runs: Sequence[Run], split: str, column: str, title: str) -> dict[str, Any]:
    found = [(number, curve(run, split, column)) for number, run in enumerate(runs)]
    curves = [{"run": number, "x": one.x, "y": one.y, "mean": one.mean} for number, one in found if one]
    return {
        "title": _plain_text(title),
        "split": split,
        "loss": column == "loss",
        "percent": "accuracy" in column,
        "curves": curves,
    }


def _plain_text(name: str) -> str:
    """Escapes `name` for plotly, which reads tags, entities and %{templates} in texts."""
    return printable(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%", "&#37;")


def curve_scripts(data: dict[str, Any]) -> list[str]:
    """The scripts of the page: plotly's library, the data, and the code that plots it.

    Raises:
        ImportError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    code = (Path(__file__).parent / "curves.js").read_text(encoding="utf-8")
    return [get_plotlyjs(), f"const fastbertCurves = {script_json(data)};", code]
