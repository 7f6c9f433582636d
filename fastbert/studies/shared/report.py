"""A report from blocks: headings, paragraphs, tables, images; written as Markdown and as one HTML page that opens
without a network, its images inside. And the words and numbers that the reports of all studies have."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.finetuning.table import NOTHING
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #999; } td.number, th.number { text-align: right; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; }
code { background: #f5f5f5; padding: 0 .2rem; } pre code { padding: 0; }
"""
_NUMBER = re.compile(r"[-+\[]*\d[-+\d .,:%e±\[\]]*( s)?|–|")


@dataclass(frozen=True)
class Table:
    """Cells are texts; a column of numbers stands to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def right(self) -> list[bool]:
        return [
            all(_NUMBER.fullmatch(row[place]) for row in self.rows) and bool(self.rows)
            for place in range(len(self.head))
        ]

    def plain(self) -> str:
        """For a terminal."""
        return "\n".join("  ".join(row).rstrip() for row in self._aligned([self.head, *self.rows]))

    def markdown(self) -> str:
        """A table that reads well as plain text too."""
        rows = self._aligned([[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)])
        marks = ["-" * (len(cell) - r) + ":" * r for cell, r in zip(rows[0], self.right(), strict=True)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))

    def _aligned(self, rows: Sequence[Sequence[str]]) -> list[list[str]]:
        widths = [max(3, *(len(row[place]) for row in rows)) for place in range(len(self.head))]
        right = self.right()
        return [
            [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
            for row in rows
        ]

    def html(self) -> str:
        right = [' class="number"' if number else "" for number in self.right()]

        def cells(row: Sequence[str], tag: str) -> str:
            inner = "".join(f"<{tag}{r}>{_inline(cell)}</{tag}>" for cell, r in zip(row, right, strict=True))
            return f"<tr>{inner}</tr>"

        body = "\n".join(cells(row, "td") for row in self.rows)
        return f"<table>\n<thead>{cells(self.head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


@dataclass
class ReportPage:
    """Blocks in their order. In texts, `backticks` mean code; nothing else is markup."""

    title: str
    _blocks: list[tuple[str, str]] = field(default_factory=list)
    """(Markdown, HTML) of each; an image's HTML is made when it is written."""
    _images: list[tuple[str, str]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self._add(f"## {text}", f"<h2>{_inline(text)}</h2>")

    def text(self, text: str) -> None:
        self._add(text, f"<p>{_inline(text)}</p>")

    def points(self, texts: Sequence[str]) -> None:
        items = "\n".join(f"<li>{_inline(text)}</li>" for text in texts)
        self._add("\n".join(f"- {text}" for text in texts), f"<ul>\n{items}\n</ul>")

    def code(self, text: str) -> None:
        self._add(f"```\n{text}\n```", f"<pre><code>{html.escape(text)}</code></pre>")

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
        images = {f"\0{name}": _embedded(folder / name, alt) for name, alt in self._images}
        body = "\n".join(images.get(page, page) for _, page in self._blocks)
        title = html.escape(self.title)
        with atomic_file(folder / "report.html", "w") as file:
            file.write(
                f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
                f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
            )


def _embedded(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


# --- what all reports have


def plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


WIDTH = 100  # characters of a line for a terminal


def p_value(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def save_plot(name: str, folder: Path, draw: Callable[..., None], *what: Any) -> str | None:
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
