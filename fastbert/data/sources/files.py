"""Documents of files on the disk: text, JSONL and Parquet, plain or compressed, by path, glob or folder.

A new format is one reader and one line in `READERS`.
"""

import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastbert.data.sources import source
from fastbert.data.sources.parquet import check_parquet, read_parquet
from fastbert.data.sources.source import Source
from fastbert.errors import UserError, brief, nearest

LONGEST_JSON_LINE = 2**28  # bytes
BOM = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}


def open_files(spec: str, column: str, hint: str) -> tuple[Source, list[Path]]:
    """The source that a path, a glob or a folder of Parquet files names, and its files.

    Args:
        hint: what else a source may be, for errors.

    Raises:
        UserError: no such file or match, no permission, or a Parquet file without the text column `column`.
    """
    paths = find_files(spec, hint)
    for path in paths:
        try:
            with open(path, "rb"):
                pass
        except PermissionError:
            raise UserError(f"no permission to read {path}; change its permissions or give another file") from None
        if is_parquet(path):
            check_parquet(path, column)
    sizes = [path.stat().st_size for path in paths]

    def read() -> Iterator[tuple[int, str]]:
        done = 0
        for path, size in zip(paths, sizes, strict=True):
            reader = read_parquet if is_parquet(path) else read_stream
            for position, text in reader(path, column):
                yield done + position, text
            done += size

    identity = {"kind": "files", "files": [file_identity(path) for path in paths]}
    return Source(spec, paths[0].name.split(".")[0] or "text", identity, sum(sizes), read), paths


def file_identity(path: Path) -> dict[str, Any]:
    """JSON that changes when the file does, and not when its folder moves."""
    about = path.stat()
    return {"name": path.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}


def find_files(spec: str, hint: str) -> list[Path]:
    """The files that `spec` means, in order: as given, or sorted by path."""
    path = Path(spec)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return [path]
    if glob.has_magic(spec):
        found = [path for path in map(Path, sorted(glob.glob(spec, recursive=True))) if path.is_file()]
        if not found:
            raise UserError(f"no file matches {spec!r}; check the pattern")
        return found
    beside = [path.name for path in path.parent.iterdir()] if path.parent.is_dir() else []
    near = f" in its folder, {nearest(path.name, beside)};" if 0 < len(beside) < 20 else ""
    raise UserError(f"source {spec!r} does not exist;{near} {hint}")


def _in_folder(folder: Path) -> list[Path]:
    """Its Parquet files, at any depth. Names with _ or . at the front are notes of the program that wrote them."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if is_parquet(path)
        and path.is_file()
        and not any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)
    ]
    if found:
        return found
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        raise UserError(f"source {folder} is a folder that datasets saved; give it as hf:{folder}")
    raise UserError(f"source {folder} is a folder; name its files, for example '{folder}/*.txt' (there is no Parquet)")


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def read_stream(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """(bytes of the file read, text) of a file that is read from its beginning to its end."""
    kind, compression = suffixes(path)
    if kind == ".parquet":
        raise UserError(f"{path}: Parquet cannot be read through {compression} and is compressed inside; unpack it")
    with open(path, "rb") as raw, _decompressed(raw, path) as stream:
        for text in READERS.get(kind, read_text)(stream, path, column):
            yield raw.tell(), text


def read_text(stream: IO[bytes], path: Path, column: str) -> Iterator[str]:
    """Documents of a text file, a blank line between them.

    Raises:
        UserError: the file is binary or not UTF-8; names line and byte.
    """
    lines: list[str] = []
    held = 0
    for line in _text_lines(stream, path):
        if line.strip():
            lines.append(line)
            held += len(line)
            if held > source.LONGEST_DOCUMENT:
                # What `documents()` would cut off the whole text, cut off early: memory stays bounded without blanks.
                text = "".join(lines)
                end = (
                    text.rfind("\n", 0, source.LONGEST_DOCUMENT) + 1 or text.rfind(" ", 0, source.LONGEST_DOCUMENT) + 1
                )
                end = end or source.LONGEST_DOCUMENT
                yield text[:end]
                lines, held = [text[end:]], len(text) - end
        elif lines and line.endswith("\n"):
            yield "".join(lines)
            lines, held = [], 0
    if lines:
        yield "".join(lines)


def read_jsonl(stream: IO[bytes], path: Path, column: str) -> Iterator[str]:
    """Documents of a JSONL file: the string `column` of every line's object.

    Raises:
        UserError: names the line that is no JSON object or whose field is missing or not a string.
    """
    number = 0
    while line := stream.readline(LONGEST_JSON_LINE):
        number += 1
        where = f"{path}, line {number}"
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) == LONGEST_JSON_LINE:
            raise UserError(f"{where} is longer than {LONGEST_JSON_LINE:,} bytes; write one object a line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
            raise UserError(f"{where} is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is a JSON {type(row).__name__}, not an object with the field {column!r}")
        if column not in row:
            hint = nearest(column, row) if row else "the object is empty"
            raise UserError(f"{where} has no field {brief(column)}; {hint}; choose with --column")
        text = row[column]
        if not isinstance(text, str):
            raise UserError(
                f"{where}: the field {column!r} is of type {type(text).__name__}, not a string; "
                "choose another with --column"
            )
        if b"\\u" in line and not _is_unicode(text):
            raise UserError(f"{where}: the field {column!r} holds half of a surrogate pair, no text; mend it")
        yield text.replace("\r\n", "\n")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


READERS: dict[str, Callable[[IO[bytes], Path, str], Iterator[str]]] = {".jsonl": read_jsonl}
COMPRESSIONS = (".gz", ".xz", ".zst")


def suffixes(path: Path) -> tuple[str, str]:
    """(format, compression): ('.jsonl', '.gz') for x.jsonl.gz."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return Path(path.name.removesuffix(compression)).suffix.lower(), compression


@contextmanager
def _decompressed(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """`raw` as its name says it is compressed; damage becomes a UserError wherever in the block it shows."""
    compression = suffixes(path)[1]
    try:
        if compression == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(stream, 2**17)
        elif compression == ".xz":
            with lzma.LZMAFile(raw) as stream:
                yield io.BufferedReader(stream, 2**17)
        elif compression == ".zst":
            import pyarrow

            yield io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**17)
        else:
            yield raw
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if not compression:
            raise UserError(f"{path} cannot be read: {error}") from error
        raise UserError(f"{path} is cut off, damaged or no {compression} file ({error}); fetch it again") from error


def _text_lines(stream: IO[bytes], path: Path) -> Iterator[str]:
    """Lines with their ends (CRLF becomes LF), in pieces where a line is longer than LONGEST_DOCUMENT bytes."""
    number, offset, rest = 1, 0, b""
    while True:
        read = stream.readline(source.LONGEST_DOCUMENT)
        line, rest = rest + read, b""
        if not line:
            return
        if offset == 0:
            kind = next((kind for magic, kind in MAGIC.items() if line.startswith(magic)), None)
            if kind:
                raise UserError(f"{path} is a {kind} file, not text; unpack it or give it the suffix that says so")
            if line.startswith(BOM):
                line, offset = line[3:], 3
        if read and not line.endswith(b"\n"):
            # A piece of a long line may end within a character: its bytes go to the next piece.
            end = len(line)
            while end > 0 and len(line) - end < 4 and line[end - 1] & 0xC0 == 0x80:
                end -= 1
            if end > 0 and line[end - 1] >= 0xC0:
                line, rest = line[: end - 1], line[end - 1 :]
        if b"\0" in line:
            place = offset + line.index(b"\0")
            raise UserError(f"{path} is binary, not text: a zero byte at byte {place}, line {number}; give UTF-8 text")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text: byte {offset + error.start} (0x{line[error.start]:02x}), line {number}; "
                f"convert it, for example with: iconv -f latin1 -t utf-8"
            ) from None
        offset += len(line)
        number += line.endswith(b"\n")
        if text.endswith("\r\n"):
            text = text[:-2] + "\n"
        if text:
            yield text
