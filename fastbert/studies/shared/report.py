"""Report of a study, from blocks: headings, paragraphs, tables, plots; written as Markdown and as one HTML page that
opens without a network. Also formats phrases and numbers for all reports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table, bullets, heading, html_page, paragraph, svg
from fastbert.streams import echo
from fastbert.studies.shared.plots import write_plot
from fastbert.studies.shared.statistics import Paired
from fastbert.training.hardware import describe_machine


@dataclass
class ReportPage:
    """Blocks in their order. In texts, `backticks` mean code; nothing else is markup."""

    title: str
    folder: Path
    """The folder of report.md, report.html and the plots."""
    _blocks: list[tuple[str, str]] = field(default_factory=list)
    """(Markdown, HTML) of each."""

    def heading(self, text: str) -> None:
        self._blocks.append((f"## {text}", heading(text)))

    def text(self, text: str) -> None:
        self._blocks.append((text, paragraph(text)))

    def points(self, texts: Sequence[str]) -> None:
        self._blocks.append(("\n".join(f"- {text}" for text in texts), bullets(texts)))

    def table(self, table: Table) -> None:
        self._blocks.append((table.markdown(), table.html()))

    def plot(self, name: str, alt: str, plot: Callable[..., Any], *what: Any) -> None:
        """Writes the figure `plot(*what)` as `name`, an SVG file, and shows it; without matplotlib, prints a warning.

        Args:
            alt: description of the plot in one line.
        """
        path = self.folder / name
        try:
            write_plot(path, plot, *what)
        except ImportError:
            echo(f"matplotlib is not installed: {name} is not written; results.jsonl has the figures")
            return
        self._blocks.append((f"![{alt}]({name})", svg(path.read_text(encoding="utf-8"), alt)))

    def write(self, about: Mapping[str, str]) -> None:
        """Writes report.md and report.html.

        Args:
            about: lines of the last section by their name.
        """
        self.heading("How it was made")
        self.points([f"{key}: {value}" for key, value in about.items()])
        with atomic_file(self.folder / "report.md", "w") as file:
            file.write("\n\n".join([f"# {self.title}", *(markdown for markdown, _ in self._blocks)]) + "\n")
        with atomic_file(self.folder / "report.html", "w") as file:
            file.write(html_page(self.title, "\n".join(page for _, page in self._blocks)))


# --- phrases and numbers of all reports


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
    precisions = ", ".join(sorted({row["precision"] for row in done}))
    return {
        "configuration": f"`{path}`",
        "machine": f"{machine['cpu']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "versions": ", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
        "commit": f"{machine['commit']}" + (", with changes" if machine["dirty"] else ""),
        "each job": f"CPU threads {threads}, precision {precisions or 'unknown'}",
        "work": f"{sum(row['seconds'] for row in done) / 60:.1f} minutes, summed over the finished jobs",
    }
