"""A report from blocks: headings, paragraphs, tables, images; written as Markdown and as one HTML page that opens
without a network, its images inside. And the words and numbers that the reports of all studies have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table, bullets, code_block, heading, html_page, paragraph, png
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine


@dataclass
class ReportPage:
    """Blocks in their order. In texts, `backticks` mean code; nothing else is markup."""

    title: str
    _blocks: list[tuple[str, str]] = field(default_factory=list)
    """(Markdown, HTML) of each; an image's HTML is made when it is written."""
    _images: list[tuple[str, str]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self._add(f"## {text}", heading(text))

    def text(self, text: str) -> None:
        self._add(text, paragraph(text))

    def points(self, texts: Sequence[str]) -> None:
        self._add("\n".join(f"- {text}" for text in texts), bullets(texts))

    def code(self, text: str) -> None:
        self._add(f"```\n{text}\n```", code_block(text))

    def table(self, table: Table) -> None:
        self._add(table.markdown(), table.html())

    def image(self, name: str, alt: str) -> None:
        """A PNG that lies in the report's folder under `name` when the report is written."""
        self._images.append((name, alt))
        self._add(f"![{alt}]({name})", f"\0{name}")

    def _add(self, markdown: str, page: str) -> None:
        self._blocks.append((markdown, page))

    def write(self, folder: Path, about: Mapping[str, str]) -> None:
        """Writes report.md and report.html; images are read from `folder`.

        Args:
            about: what the last section says: lines by their name.
        """
        self.heading("How it was made")
        self.points([f"{key}: {value}" for key, value in about.items()])
        with atomic_file(folder / "report.md", "w") as file:
            file.write("\n\n".join([f"# {self.title}", *(markdown for markdown, _ in self._blocks)]) + "\n")
        images = {f"\0{name}": png((folder / name).read_bytes(), alt) for name, alt in self._images}
        body = "\n".join(images.get(page, page) for _, page in self._blocks)
        with atomic_file(folder / "report.html", "w") as file:
            file.write(html_page(self.title, body))


# --- what all reports have


def plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


WIDTH = 100  # characters of a line for a terminal


def p_value(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def save_drawing(name: str, folder: Path, draw: Callable[..., None], *what: Any) -> str | None:
    """The drawing's name; None where matplotlib is missing."""
    try:
        draw(folder / name, *what)
    except ImportError:
        echo(f"matplotlib is not installed: {name} is not drawn; results.jsonl has the figures")
        return None
    return name


def circumstances(path: str, threads: int, done: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Lines by name for the end of a report: where and with what the finished jobs were run."""
    machine = describe_machine()
    precisions = ", ".join(sorted({row["precision"] for row in done}))
    return {
        "axes": f"`{path}`",
        "machine": f"{machine['cpu']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "versions": ", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
        "commit": f"{machine['commit']}" + (", with changes" if machine["dirty"] else ""),
        "a job": f"CPU threads {threads}, precision {precisions or 'unknown'}",
        "work": f"{sum(row['seconds'] for row in done) / 60:.1f} minutes, summed over the finished jobs",
    }
