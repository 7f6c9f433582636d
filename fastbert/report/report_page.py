"""A report of blocks: headings, paragraphs, tables, plots; written as Markdown and as one HTML page that opens without
a network."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.report.page import Table, bullets, heading, html_page, paragraph, svg
from fastbert.streams import echo


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
            echo(f"matplotlib is not installed: {name} is not written; the tables have the figures")
            return
        self._blocks.append((f"![{alt}]({name})", svg(path.read_text(encoding="utf-8"), alt)))

    def write(self, about: Mapping[str, str]) -> None:
        """Writes report.md and report.html, and removes plots of an earlier report that this one does not show.

        Args:
            about: lines of the last section by their name.
        """
        self.heading("How it was made")
        self.points([f"{key}: {value}" for key, value in about.items()])
        former = self._former_plots()
        with atomic_file(self.folder / "report.md", "w") as file:
            file.write("\n\n".join([f"# {self.title}", *(markdown for markdown, _ in self._blocks)]) + "\n")
        with atomic_file(self.folder / "report.html", "w") as file:
            file.write(html_page(self.title, "\n".join(page for _, page in self._blocks)))
        for name in former - _plots_in("\n".join(markdown for markdown, _ in self._blocks)):
            (self.folder / name).unlink(missing_ok=True)

    def _former_plots(self) -> set[str]:
        """Names of the plots that an earlier report in the folder shows."""
        path = self.folder / "report.md"
        return _plots_in(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else set()


def _plots_in(markdown: str) -> set[str]:
    """Names of the SVG files that a report shows."""
    return set(re.findall(r"^!\[.*\]\(([a-z0-9_-]+\.svg)\)$", markdown, re.MULTILINE))


def write_plot(path: Path, plot: Callable[..., Any], *what: Any) -> None:
    """Writes the figure `plot(*what)` in the format of the path's suffix. SVG files hold text as text,
    and are equal to the byte for equal figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    # Ids in the SVG are hashes with this salt, so the ids of two plots in one page differ.
    rc = {"svg.fonttype": "none", "svg.hashsalt": path.name, "text.parse_math": False}
    with matplotlib.rc_context(rc), atomic_file(path) as file:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        plot(*what).savefig(file, format=path.suffix[1:], metadata=metadata)
