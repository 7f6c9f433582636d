"""The format of a file, by its suffix and its first bytes. Formats that are neither text nor a table are refused with
advice.

Tables are .jsonl, .ndjson, .json, .csv, .tsv and .parquet; all but the last may be compressed, as text may. A file with
any other suffix, or none, is text.
"""

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from fastbert.data.read_ahead import BLOCKS, ReadAhead
from fastbert.errors import UserError
from fastbert.inputs import open_input, raise_refusal

COMPRESSIONS = tuple(BLOCKS)
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

_MARKUP = "extract its text first, for example with trafilatura"
_DOCUMENT = "convert it to text first, for example with pandoc or pdftotext"
_ARCHIVE = "unpack it and give the files in it"
_COMPRESSED = "unpack it, or compress it with gzip, xz or zstd"
_TABLE = "write its rows as .parquet, .jsonl or .csv first"
_DATA = "give text, or a table with a column of text"

REFUSED = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml"), ("HTML", _MARKUP)),
    **dict.fromkeys((".warc", ".arc"), ("a web archive", _MARKUP)),
    ".xml": ("XML", "extract its text first"),
    ".pdf": ("PDF", _DOCUMENT),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi"), ("a formatted document", _DOCUMENT)),
    **dict.fromkeys((".ppt", ".pptx", ".odp"), ("a presentation", _DOCUMENT)),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".txz", ".tbz2", ".7z", ".rar"), ("an archive", _ARCHIVE)),
    **dict.fromkeys(
        (".bz2", ".lz4", ".lzma", ".br", ".z", ".snappy"), ("compressed in a format that is not supported", _COMPRESSED)
    ),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("a spreadsheet", _TABLE)),
    **dict.fromkeys((".sqlite", ".sqlite3", ".db"), ("a database", _TABLE)),
    ".arrow": ("an Arrow file", f"{_TABLE}; a folder that datasets saved is given as hf:FOLDER"),
    ".feather": ("a Feather file", _TABLE),
    ".orc": ("an ORC file", _TABLE),
    ".avro": ("an Avro file", _TABLE),
    **dict.fromkeys((".h5", ".hdf5"), ("an HDF5 file", _TABLE)),
    **dict.fromkeys((".npy", ".npz"), ("a NumPy file", _DATA)),
    **dict.fromkeys((".pkl", ".pickle"), ("a pickle, which is never opened", _TABLE)),
    **dict.fromkeys((".pt", ".pth", ".ckpt"), ("a PyTorch file", _DATA)),
    ".safetensors": ("a file of weights", _DATA),
    **dict.fromkeys(
        (".yaml", ".yml"), ("a YAML file", f"options in a file come first, as in fastbert pretrain FILE.yaml; {_DATA}")
    ),
}

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"%PDF-": "PDF",
    b"{\\rtf": "RTF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "Microsoft Office",
    b"ARROW1": "Arrow",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x93NUMPY": "NumPy",
    b"SQLite format 3\x00": "SQLite",
    b"Obj\x01": "Avro",
}
TAR = (257, b"ustar")  # offset and magic bytes
BEGINNING = 1024  # bytes


def suffixes(path: Path) -> tuple[str, str]:
    """(format, compression), in lower case: ('.jsonl', '.gz') for x.jsonl.gz."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    name = path.name[: -len(compression)] if compression else path.name
    return Path(name).suffix.lower(), compression


def is_table(path: Path) -> bool:
    return suffixes(path)[0] in TABLES


def check_name(path: Path) -> None:
    """Raises a UserError if the name means standard input, or the suffix is that of an unsupported format."""
    if str(path) == "-":
        raise UserError(
            "- would be standard input, which can be read only once; write it into a file first (cat > text.txt) and "
            "give that; a file called - is given by its absolute path"
        )
    kind, compression = suffixes(path)
    if kind in REFUSED:
        what, remedy = REFUSED[kind]
        raise UserError(f"{path} is {what} by its suffix {kind}, which is not read; {remedy}")
    if kind == ".parquet" and compression:
        raise UserError(f"{path}: Parquet cannot be read through {compression} and is compressed inside; unpack it")


def refuse_magic(beginning: bytes, path: Path) -> None:
    """Raises a UserError that names the format if a file with this beginning is not text."""
    kind = next((kind for magic, kind in MAGIC.items() if beginning.startswith(magic)), None)
    if kind is None and beginning[TAR[0] :].startswith(TAR[1]):
        kind = "tar"
    if kind:
        compression = suffixes(path)[1]
        inside = f" inside {compression}" if compression else ""
        raise UserError(f"{path} is a {kind} file{inside}, not text; unpack it or give it the suffix of its format")


@contextmanager
def opened(path: Path) -> Iterator[tuple[Callable[[], int], IO[bytes]]]:
    """Opens a file and yields (function that returns the number of its bytes read so far, its decompressed content).

    Raises:
        UserError: it cannot be opened, or is found to be damaged while it is read in the block.
    """
    compression = suffixes(path)[1]
    with open_input(path) as raw:
        try:
            if compression:
                with closing(ReadAhead(raw, BLOCKS[compression](raw))) as ahead:
                    yield lambda: ahead.position, io.BufferedReader(ahead, 2**17)
            else:
                yield raw.tell, raw
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise_refusal(error, path)
            if not compression:
                raise UserError(f"{path} cannot be read: {error}") from error
            raise UserError(
                f"{path} is cut off, damaged or not a {compression} file ({error}); fetch it again"
            ) from error


def looks_like(path: Path) -> str:
    """Format that the beginning of the text file `path` suggests, empty for plain text. Raises a UserError if the file
    cannot be opened or is damaged."""
    with opened(path) as (_, stream):
        beginning = stream.read(BEGINNING).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if beginning.startswith((b"<!doctype html", b"<html", b"<?xml", b"<!doctype xml")):
        return "HTML or XML"
    if beginning.startswith((b'{"', b'[{"')):
        return "JSON"
    return ""
