"""Index of the words with notes in a split: where each of them occurs, in a file that is mapped into memory.

A corpus of 10^10 tokens has tens of millions of such occurrences. They are found once, written into the folder of the
data, and then mapped by every process of every run with the same words and length of a sequence, so that the processes
of a machine have one copy of them in memory. The file can be removed at any time; it is written again when needed.
"""

import hashlib
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.integrity import compare, file_record, remember, unverified
from fastbert.data.shards import TokenStream
from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.progress import Progress, progress
from fastbert.records import COUNT, json_text, read_sealed, write_sealed
from fastbert.streams import echo

FOLDER = "notes"
"""Folder of the indices in a prepared folder."""
VERSION = 1
OCCURRENCES, RECORD = "occurrences.bin", "record.json"
BLOCK_TOKENS = 2**24  # tokens whose occurrences are in memory at a time
BLOCK_POSITIONS = 2**20  # positions of a finished index that are read at a time
_SHAPE = {"occurrences": COUNT, "tokens": COUNT, "squares": COUNT, "file": {"bytes": COUNT, "sha256": str}}


@dataclass(frozen=True)
class NoteIndex:
    """Occurrences of words with notes that are whole in a row, in the order of the stream: 18 bytes each, or 22 if a
    row has 2^16 tokens or more."""

    positions: np.ndarray
    """int64: position of the first piece in the stream."""
    words: np.ndarray
    """int32: row of the word in the dictionary."""
    lefts: np.ndarray
    """uint16 or uint32: tokens of the document before the first piece, at most those of a row."""
    rights: np.ndarray
    """uint16 or uint32: tokens of the document from the first piece on, without its [SEP], at most those of a row."""
    lengths: np.ndarray
    """uint16: number of pieces."""
    tokens: int
    """Pieces of all occurrences."""
    squares: int
    """Sum over the rows of the squared number of occurrences."""


def note_index(stream: TokenStream, row_of_word: np.ndarray, width: int, folder: Path | None) -> NoteIndex:
    """The index of a split, from `folder` if it was written there, or else written there.

    Args:
        row_of_word: row in the dictionary of each rare word of the stream, -1 for words without a note.
        width: tokens of the stream in a row.
        folder: folder of this index, by `index_folder`; None writes a temporary file.
    """
    if folder is not None and (found := _known(folder, width)) is not None:
        return found
    # Counted first, because each field begins where the previous one ends.
    with progress("counting the words of the note dictionary", len(stream), "tokens") as work:
        count = sum(int((row_of_word[words] >= 0).sum()) for *_, words in _whole_words(stream, width, work))
    record: dict[str, Any] = {"occurrences": count, "tokens": 0, "squares": 0}
    if folder is not None:
        try:
            with atomic_file(folder / OCCURRENCES) as file:
                _write(file, stream, row_of_word, width, record)
            record["file"] = file_record(folder / OCCURRENCES)
            write_sealed(folder / RECORD, record)
            remember(folder, unverified(folder, {OCCURRENCES: record["file"]}, True)[1])
        except UserError as error:
            echo(f"each process finds the words of the note dictionary at every start: {error}")
            record |= {"tokens": 0, "squares": 0}
        else:
            with open(folder / OCCURRENCES, "rb") as file:
                return _mapped(file, width, record)
    with tempfile.TemporaryFile() as file:
        _write(file, stream, row_of_word, width, record)
        file.flush()
        return _mapped(file, width, record)


def index_folder(data: Path, split: str, shards: list[Any], row_of_word: np.ndarray, width: int) -> Path:
    """Folder of an index: its name is a hash of everything that the index depends on.

    Args:
        data: the prepared folder.
        shards: the split's shards in dataset.json, with the hashes of their files.
    """
    sha = hashlib.sha256(json_text([VERSION, split, shards, width], sort_keys=True).encode())
    sha.update(np.ascontiguousarray(row_of_word, np.int32))
    return data / FOLDER / sha.hexdigest()[:32]


def distinct(positions: np.ndarray, size: int) -> int:
    """Number of segments of `size` tokens that contain one of the ascending positions."""
    count, last = 0, -1
    for start in range(0, len(positions), BLOCK_POSITIONS):
        segments = positions[start : start + BLOCK_POSITIONS] // size
        count += int((np.diff(segments, prepend=last) != 0).sum())
        last = segments[-1]
    return count


def _known(folder: Path, width: int) -> NoteIndex | None:
    """The index in `folder`, which is compared with its hash once per machine; None if it is missing or damaged."""
    try:
        record = read_sealed(folder / RECORD, "index of notes", _SHAPE, "remove it")
        left, marks = unverified(folder, {OCCURRENCES: record["file"]}, False)
        if left:
            compare(folder, {OCCURRENCES: record["file"]}, "remove it")
            remember(folder, marks)
        with open(folder / OCCURRENCES, "rb") as file:
            return _mapped(file, width, record)
    except (UserError, FileNotFoundError):
        return None


def _types(width: int) -> dict[str, np.dtype]:
    """Types of the arrays in the file, in its order: the largest numbers first, so that all are aligned."""
    side = np.uint16 if width < 2**16 else np.uint32
    types = {"positions": np.int64, "words": np.int32, "lefts": side, "rights": side, "lengths": np.uint16}
    return {name: np.dtype(dtype) for name, dtype in types.items()}


def _mapped(file: IO[bytes], width: int, record: dict[str, Any]) -> NoteIndex:
    """The arrays in `file`, mapped into memory."""
    count, start, arrays = record["occurrences"], 0, {}
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if count else b""
    for name, dtype in _types(width).items():
        arrays[name] = np.frombuffer(data, dtype, count, start) if count else np.zeros(0, dtype)
        start += count * dtype.itemsize
    return NoteIndex(**arrays, tokens=record["tokens"], squares=record["squares"])


def _write(file: IO[bytes], stream: TokenStream, row_of_word: np.ndarray, width: int, record: dict[str, Any]) -> None:
    """Writes all occurrences, and adds the sums over them to `record`."""
    offset, offsets = 0, {}
    for name, dtype in _types(width).items():
        offsets[name] = offset
        offset += record["occurrences"] * dtype.itemsize
    with progress("finding the words of the note dictionary", len(stream), "tokens") as work:
        for positions, lengths, words in _whole_words(stream, width, work):
            noted = row_of_word[words] >= 0
            positions, lengths, words = positions[noted], lengths[noted], row_of_word[words[noted]]
            first, end = stream.document_borders(positions)
            arrays = {
                "positions": positions,
                "words": words,
                "lefts": np.minimum(positions - first, width),
                "rights": np.minimum(end - 1 - positions, width),  # the last token is [SEP]
                "lengths": lengths,
            }
            for name, dtype in _types(width).items():
                file.seek(offsets[name])
                file.write(np.ascontiguousarray(arrays[name], dtype).data)
                offsets[name] += len(positions) * dtype.itemsize
            record["tokens"] += int(lengths.sum(dtype=np.int64))
            _, counts = np.unique(positions // width, return_counts=True)  # a block has whole rows
            record["squares"] += int(np.square(counts.astype(np.int64)).sum())


def _whole_words(stream: TokenStream, width: int, work: Progress) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields blocks of (position, pieces, rare word) for rare words that are whole in a row, in stream order."""
    rows, block = len(stream) // width, max(1, BLOCK_TOKENS // width)
    for start in range(0, rows, block):
        found = stream.rare(start * width, min(start + block, rows) * width)
        whole = (found.positions + np.maximum(found.lengths, 1) - 1) // width == found.positions // width
        yield found.positions[whole], found.lengths[whole], found.words[whole]
        work.update(min(start + block, rows) * width)
