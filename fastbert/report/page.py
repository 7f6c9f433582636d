"""Building blocks of an HTML page that opens without a network: escaped text, tables, folds, images, one style sheet.

Every function returns HTML and escapes its texts, so that a name with tags, quotes, line breaks or characters that
change the writing direction is shown as text. A content security policy forbids the page to load anything.
"""

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.errors import printable
from fastbert.records import json_text

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --faint: #656d76; --line: #d8dee4;
  --block: #f6f8fa; --accent: #0969da; --warning: #9a6700; --warning-block: #fff8c5; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --faint: #8d96a0; --line: #30363d;
  --block: #161b22; --accent: #4493f8; --warning: #d29922; --warning-block: #272115; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1.2rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; } h1 { font-size: 1.7rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p, ul { max-width: 64rem; } .faint { color: var(--faint); }
.warning { background: var(--warning-block); border-left: 4px solid var(--warning); padding: .5rem .8rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  max-width: 34rem; unicode-bidi: isolate; }
td.long { min-width: 16rem; white-space: pre-line; overflow-wrap: anywhere; } th { overflow-wrap: break-word; }
td:not(.long) { white-space: nowrap; }
th { border-bottom: 2px solid var(--faint); vertical-align: bottom; } td.number, th.number { text-align: right; }
td:not(.number):not(.long) { max-width: none; }
@media (min-width: 700px) { th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); } }
svg { display: block; max-width: 100%; height: auto; } .image { background: #fff; border-radius: 6px; padding: .4rem; }
figure { margin: 1rem 0; } figcaption { color: var(--faint); font-size: .9rem; max-width: 64rem; }
code { background: var(--block); padding: 0 .2rem; unicode-bidi: isolate; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: .8rem 0; }
.controls[hidden] { display: none; } label { white-space: nowrap; } label > * { vertical-align: middle; }
.excerpt { background: var(--block); padding: .5rem .7rem; white-space: pre-wrap; margin: .5rem 0; }
.scroll > svg { min-width: 40rem; } details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
"""
_NUMBER = re.compile(r"[-+\[]*\d[-+\d .,:/%e±\[\]]*( s|[kMGB])?|–|")
SVG_WIDTH = 620  # pixels; wide plots are not scaled down further
LONG = 40  # characters of a cell that is wrapped instead of widening the table
WIDE = 100  # characters of a line in a terminal


def inline(text: str) -> str:
    """Escapes `text`; `backticks` mean code, nothing else is markup. Longer runs enclose code with backticks."""
    return re.sub(r"(?<!`)(`+)(?!`)( ?)(.+?)\2(?<!`)\1(?!`)", r"<code>\3</code>", escape(text))


def code(text: str) -> str:
    """`text`, which may have backticks, as code in Markdown and for `inline`; empty text stays empty."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def escape(text: str) -> str:
    """Escapes `text` for an element or a quoted attribute. Control characters and those that change the writing
    direction become visible, line breaks stay."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{inline(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{inline(text)}</p>"


def warning(text: str) -> str:
    return f'<p class="warning">{inline(text)}</p>'


def bullets(texts: Sequence[str]) -> str:
    items = "\n".join(f"<li>{inline(text)}</li>" for text in texts)
    return f"<ul>\n{items}\n</ul>"


def excerpt(text: str) -> str:
    """A block of running text that preserves line breaks and wraps long lines."""
    return f'<p class="excerpt">{escape(text)}</p>'


def fold(title: str, body: str) -> str:
    """A closed section that opens by a click on `title`; `body` is HTML."""
    return f"<details>\n<summary>{inline(title)}</summary>\n{body}\n</details>"


def svg(text: str, alt: str) -> str:
    """A plot inside the page, from the text of an SVG file that matplotlib wrote, with the caption `alt`. On a narrow
    screen it scrolls before its text becomes too small to read."""
    width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', text)[1]) * 4 / 3
    image = text[text.index("<svg") :].replace("<svg", f'<svg style="min-width: {min(width, SVG_WIDTH):.0f}px"', 1)
    caption = f"<figcaption>{inline(alt)}</figcaption>"
    return f'<figure>\n<div class="image scroll" tabindex="0">\n{image}</div>\n{caption}\n</figure>'


def script_json(value: Any) -> str:
    """JSON for a script of the page: no text in it can end the script or begin a comment."""
    text = json_text(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@dataclass(frozen=True)
class Table:
    """A table of texts, for HTML, Markdown and a terminal. Columns of numbers are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def right(self) -> list[bool]:
        return [
            all(_NUMBER.fullmatch(row[column]) for row in self.rows) and bool(self.rows)
            for column in range(len(self.head))
        ]

    def plain(self) -> str:
        """The table for a terminal. If it is wider than WIDE, the headings are broken at spaces to the width of their
        columns."""
        lines = self._aligned([self.head, *self.rows])
        if sum(len(cell) + 2 for cell in lines[0]) - 2 > WIDE:
            head = self._broken_head()
            lines = self._aligned([*head, *self.rows])
        return "\n".join("  ".join(row).rstrip() for row in lines)

    def _broken_head(self) -> list[tuple[str, ...]]:
        """The headings, broken into lines; those with fewer lines than the longest are at the bottom."""
        columns = []
        for column, name in enumerate(self.head):
            width = max(len(text) for text in (*name.split(), *(row[column] for row in self.rows), "-"))
            columns.append(textwrap.wrap(name, width, break_on_hyphens=False))
        height = max(map(len, columns))
        return list(zip(*([""] * (height - len(column)) + column for column in columns), strict=True))

    def markdown(self) -> str:
        """A Markdown table that reads well as plain text too."""
        rows = self._aligned([[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)])
        marks = ["-" * (len(cell) - r) + ":" * r for cell, r in zip(rows[0], self.right(), strict=True)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))

    def _aligned(self, rows: Sequence[Sequence[str]]) -> list[list[str]]:
        widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(self.head))]
        right = self.right()
        return [
            [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
            for row in rows
        ]

    def html(self) -> str:
        """The table in a container that scrolls, so that no column is cut off on a narrow screen."""
        right = self.right()

        def cells(row: Sequence[str], tag: str) -> str:
            inner = ""
            for cell, number in zip(row, right, strict=True):
                name = "number" if number else "long" if tag == "td" and len(cell) > LONG else ""
                inner += f"<{tag}{f' class={name}' if name else ''}>{inline(cell)}</{tag}>"
            return f"<tr>{inner}</tr>"

        body = "\n".join(cells(row, "td") for row in self.rows)
        table = f"<table>\n<thead>{cells(self.head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        return f'<div class="scroll" tabindex="0">\n{table}\n</div>'


def html_page(title: str, body: str, scripts: Sequence[str] = (), generator: str = "fastbert") -> str:
    """A complete page.

    Args:
        body: HTML below the title.
        scripts: JavaScript, not escaped: data in it goes through `script_json`.
        generator: name of the program that wrote the page, by which the page is recognized later.
    """
    allowed = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:"
    if scripts:
        allowed += "; script-src 'unsafe-inline'"
    ends = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{escape(generator)}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n{ends}</body>\n</html>\n"
    )
