"""Documents of files on the disk, text or tables, by path, glob or folder."""

import glob
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastbert.data.columns import Columns
from fastbert.data.formats import check_name, is_table, looks_like, opened, suffixes
from fastbert.data.sources import source
from fastbert.data.sources.source import Chunk, Source
from fastbert.data.tables import check_columns, read_rows
from fastbert.data.text import pieces
from fastbert.errors import UserError, brief
from fastbert.inputs import input_errors, near_name, open_input, refuse_slash


def open_files(spec: str, column: str, hint: str) -> tuple[Source, list[Path]]:
    """Opens a path, a glob or a folder of Parquet files as a source; returns the source and its files.

    Args:
        hint: other possible sources, for error messages.

    Raises:
        UserError: no file exists or matches, it cannot be read, has a format that is not read, or is a table without
            the text column `column`.
    """
    paths = find_files(spec, hint)
    warnings = []
    for path in paths:
        check_name(path)
        open_input(path).close()
        if is_table(path):
            check_columns(path, Columns((column,)))
        elif other := looks_like(path):
            warnings.append(
                f"{path} looks like {other}, but is read as plain text because of its name, all characters included"
            )
    identity = {"kind": "files", "files": [_identity(path) for path in paths]}
    name = paths[0].name.split(".")[0] or "text"
    chunks = [Chunk(path.stat().st_size, partial(read_file, path, column)) for path in paths]
    return Source(spec, name, identity, sum(chunk.size for chunk in chunks), chunks, warnings=warnings), paths


def file_identity(path: Path) -> dict[str, Any]:
    """JSON that changes when the file changes, but not when its folder is moved."""
    about = path.stat()
    return {"name": path.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}


def _identity(path: Path) -> dict[str, Any]:
    kind = suffixes(path)[0]
    # Without the format, these files would match a folder that an older version prepared from them as plain text.
    return file_identity(path) | ({"format": kind} if kind in (".ndjson", ".json", ".csv", ".tsv") else {})


def find_files(spec: str, hint: str) -> list[Path]:
    """The files that `spec` names, as given or sorted by path."""
    path = Path(spec)
    with input_errors(spec, "source"):
        if path.is_dir():
            return _in_folder(path)
        refuse_slash(spec)
        if os.path.lexists(path) or spec == "-":
            return [path]
        if glob.has_magic(spec):
            found = [path for path in map(Path, sorted(glob.glob(spec, recursive=True))) if path.is_file()]
            if not found:
                raise UserError(f"no file matches {brief(spec)}; check the pattern")
            return found
    near = near_name(path)
    if not near and re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not path.parent.is_dir():
        near = f"; a dataset on the hub is hf:{spec}"
    raise UserError(f"source {brief(spec)} does not exist{near}{' Else' if near.endswith('?') else ';'} {hint}")


def _in_folder(folder: Path) -> list[Path]:
    """Parquet files of a folder, at any depth. Names that begin with _ or . are metadata of other programs."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".parquet"
        and path.is_file()
        and not any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)
    ]
    if found:
        return found
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        raise UserError(f"source {folder} is a folder that datasets saved; give it as hf:{folder}")
    if (folder / "dataset.json").is_file():
        raise UserError(f"source {folder} is prepared data, not text; use it with fastbert pretrain --data {folder}")
    if (folder / "checkpoints").is_dir():
        raise UserError(f"source {folder} is a run, not text; a run is resumed with --resume {folder}")
    if (folder / "config.json").is_file():
        raise UserError(f"source {folder} is a model, not text; --init-from {folder} starts from its weights")
    suffix = next((path.suffix for path in sorted(folder.iterdir()) if path.is_file() and path.suffix), ".txt")
    raise UserError(
        f"source {folder} is a folder; name its files, for example '{folder}/*{suffix}' (there is no Parquet)"
    )


def read_file(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Yields (bytes of the file read, text) for every document: in a table, for every row whose cell is not null.

    Raises:
        UserError: the file cannot be read; the message names the line or row.
    """
    if not is_table(path):
        with opened(path) as (position, stream):
            for text in read_text(stream, path):
                yield position(), text
        return
    for position, where, (text,) in read_rows(path, Columns((column,))):
        if isinstance(text, str):
            yield position, text
        elif text is not None:
            raise UserError(
                f"{where}: the column {brief(column)} is of type {type(text).__name__}, not text; choose with --column"
            )


def read_text(stream: IO[bytes], path: Path) -> Iterator[str]:
    """Documents of a text file, separated by blank lines.

    Raises:
        UserError: the file is binary or not UTF-8; the message names line and byte.
    """
    lines: list[str] = []
    held, blank = 0, True
    for _, line in pieces(stream, path):
        blank = blank and not line.strip()
        ends = line.endswith("\n")
        if blank and ends:
            if lines:
                yield "".join(lines)
            lines, held = [], 0
            continue
        lines.append(line)
        held += len(line)
        if held > source.LONGEST_DOCUMENT:
            # The pieces that `documents()` would cut from the whole text: bounds the memory without blank lines.
            ready, rest = source.cut_early("".join(lines))
            yield from ready
            lines, held = [rest], len(rest)
        blank = blank or ends
    if lines:
        yield "".join(lines)
