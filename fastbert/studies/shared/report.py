"""Phrases and numbers of the reports of studies, and the lines at their end."""

from collections.abc import Sequence
from typing import Any

from fastbert.finetuning.table import NOTHING
from fastbert.studies.shared.statistics import Paired
from fastbert.training.hardware import describe_machine

WIDTH = 100  # characters of a line for a terminal


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2f}"


def difference(result: Paired) -> str:
    """The mean difference, x 100."""
    return f"{100 * result.mean:+.2f}"


def interval(result: Paired) -> str:
    """The 95 % interval of a difference, x 100."""
    return NOTHING if result.low is None else f"[{100 * result.low:+.2f}, {100 * result.high:+.2f}]"


def p_value(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def short_count(value: float) -> str:
    """A number for tables, such as 5.4M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def provenance(path: str, threads: int, done: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Lines by name for the end of a report: configuration, machine and versions of the finished jobs."""
    machine = describe_machine()
    precisions = ", ".join(sorted({row["precision"] for row in done} - {NOTHING}))  # jobs that compute nothing
    return {
        "configuration": f"`{path}`",
        "machine": f"{machine['cpu']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "versions": ", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
        "commit": f"{machine['commit']}" + (", with changes" if machine["dirty"] else ""),
        "each job": f"CPU threads {threads}, precision {precisions or 'unknown'}",
        "work": f"{sum(row['seconds'] for row in done) / 60:.1f} minutes, summed over the finished jobs",
    }
