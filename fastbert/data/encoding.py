"""Encodes documents as ids, several times faster than the tokenizers library alone and with the same ids.

BERT's pre-tokenization never looks across white space or ASCII punctuation, so the ids of a text are those of its
chunks between them. Natural text repeats its chunks: the library encodes each distinct chunk once; after that its ids
come from a table, and numpy concatenates them. Worker processes run this module, so it imports little.
"""

import itertools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process

import numpy as np

from fastbert.data.hashing import mix
from fastbert.data.tokenizer import WordPiece

TABLE_ENTRIES = 2**19  # distinct chunks that a process remembers; then it clears the table
TABLE_CHARACTERS = 2**25
MUCH_UNKNOWN = 0.01  # a warning is printed above this fraction of [UNK] among the tokens of a text
# str.split() also splits at these, but for BERT they are control characters or part of a word.
ODD_SPACE = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
PLAIN_SPACE = re.compile("[ \t\n\r]+")
# Separate words for BERT, frequent enough that a pass over the text that puts spaces around them pays off.
PUNCTUATION = ",.-()\"':;"


@dataclass
class Encoded:
    """A batch of documents as ids."""

    tokens: np.ndarray
    """uint16 or uint32 [sum of lengths]: every document's ids and one [SEP]."""
    lengths: np.ndarray
    """int64 [documents]: tokens, [SEP] included."""
    sizes: np.ndarray
    """int64 [documents]: UTF-8 bytes of text."""
    whitespace_words: np.ndarray
    """int64 [documents]: words between white space, as `str.split` separates them."""
    word_hashes: np.ndarray
    """uint64, sorted: hashes of the distinct words of the counted documents."""
    word_counts: np.ndarray
    """int64: number of occurrences of each word in these documents."""


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def word_starts(tokens: np.ndarray, continuing: np.ndarray) -> np.ndarray:
    """Starts of the runs of pieces joined by ##, int64 [words]; [UNK], [SEP] and similar tokens are separate runs."""
    return np.flatnonzero(~continuing[tokens])


def hash_words(tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes, int64 lengths in pieces) of the runs that begin at `starts`; starts[0] must be 0.

    A hash is the sum over the run of a hash of (id, index in the run). It has 64 bits: among 10 million distinct words,
    the probability that two have the same hash is 3e-6.
    """
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    lengths = np.diff(starts, append=len(tokens))
    index = np.arange(len(tokens), dtype=np.uint64) - np.repeat(starts.astype(np.uint64), lengths)
    return np.add.reduceat(mix(tokens + (index << np.uint64(32))), starts), lengths


def sum_by_key(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct `keys`, sorted, and the sum of the `values` of each."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    return keys[starts], np.add.reduceat(values[order], starts) if len(keys) else values


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices start, start + 1, ..., start + length - 1 of every run, one run after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


class _Chunks(dict[str, int]):
    """Chunk -> its row in the table. Looking up an unknown chunk assigns the next row and appends it to `fresh`."""

    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self.lowercase = lowercase
        self.rows = self.characters = 0
        self.fresh: list[str] = []

    def __missing__(self, chunk: str) -> int:
        self.characters += len(chunk)
        lower = chunk.lower() if self.lowercase and chunk.isascii() else chunk
        if lower != chunk:
            row = self[lower]
        else:
            row = self.rows
            self.rows += 1
            self.fresh.append(chunk)
        self[chunk] = row
        return row


class TextEncoder:
    """Encodes documents as ids. "[MASK]" and other special tokens in a document are ordinary text."""

    def __init__(self, wordpiece: WordPiece) -> None:
        self._lowercase = wordpiece.lowercase
        self._library = wordpiece.build()
        self._library.encode_special_tokens = True
        self._continuing = wordpiece.continuing
        self._special = np.zeros(len(wordpiece.tokens), dtype=bool)
        self._special[list(wordpiece.special_ids)] = True
        self._separator = wordpiece.ids["[SEP]"]
        self._unknown = wordpiece.ids["[UNK]"]
        self._dtype = token_dtype(len(wordpiece.tokens))
        self._forget()

    def _forget(self) -> None:
        self._chunks = _Chunks(self._lowercase)
        self._ids = np.zeros(0, self._dtype)
        self._lengths = np.zeros(0, np.int64)
        self._starts = np.zeros(0, np.int64)

    def encode(self, documents: Sequence[str], counted: Sequence[bool]) -> Encoded:
        """Ids of `documents`, and the words of those that are `counted`."""
        if len(self._chunks) > TABLE_ENTRIES or self._chunks.characters > TABLE_CHARACTERS:
            self._forget()
        split = [split_chunks(text) for text in documents]
        chunks_per_document = np.fromiter(map(len, split), np.int64, len(split))
        chunks = itertools.chain.from_iterable(split)
        rows = np.fromiter(map(self._chunks.__getitem__, chunks), np.int64, chunks_per_document.sum())
        self._learn()

        lengths = self._lengths[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum(chunks_per_document)]
        tokens = np.insert(self._ids[spread(self._starts[rows], lengths)], ends, self._separator)
        sizes = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in documents), np.int64, len(split))

        spaced = np.fromiter((len(text.split()) for text in documents), np.int64, len(split))

        often = np.bincount(rows[np.repeat(np.asarray(counted, dtype=bool), chunks_per_document)])
        used = np.flatnonzero(often)
        return Encoded(tokens, np.diff(ends, prepend=0) + 1, sizes, spaced, *self._words(used, often[used]))

    def unknown_bytes(self, text: str) -> int:
        """UTF-8 bytes of the words of `text` that become [UNK]; slow, because it needs the library's offsets."""
        encoding = self._library.encode(text, add_special_tokens=False)
        spans = (span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == self._unknown)
        return sum(len(text[start:stop].encode()) for start, stop in spans)

    def _learn(self) -> None:
        """Encodes the new chunks with the library and appends them to the table."""
        fresh, self._chunks.fresh = self._chunks.fresh, []
        parts = []
        for first in range(0, len(fresh), 4096):  # an Encoding is large: encode few at a time
            encodings = self._library.encode_batch_fast(fresh[first : first + 4096], add_special_tokens=False)
            parts += [encoding.ids for encoding in encodings]
        if parts:
            ids = np.fromiter(itertools.chain.from_iterable(parts), self._dtype)
            self._ids = np.concatenate([self._ids, ids])
            self._lengths = np.concatenate([self._lengths, np.fromiter(map(len, parts), np.int64, len(parts))])
            self._starts = np.cumsum(self._lengths) - self._lengths

    def _words(self, rows: np.ndarray, often: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct words and their counts, given how often each row of the table occurs."""
        lengths = self._lengths[rows]
        tokens = self._ids[spread(self._starts[rows], lengths)]
        starts = word_starts(tokens, self._continuing)
        hashes, _ = hash_words(tokens, starts)
        counts = np.repeat(often, lengths)[starts]
        real = ~self._special[tokens[starts]]
        return sum_by_key(hashes[real], counts[real])


def split_chunks(text: str) -> list[str]:
    """Chunks whose ids, one after the other, are the ids of `text`."""
    for mark in PUNCTUATION:
        if mark in text:
            text = text.replace(mark, f" {mark} ")
    return PLAIN_SPACE.split(text) if ODD_SPACE.search(text) else text.split()


_encoder: TextEncoder | None = None


def start_worker(wordpiece: WordPiece) -> None:
    """Makes this process a worker: it uses one thread, and exits with its parent even if the parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_encoder(wordpiece)
    parent = parent_process()
    assert parent is not None, "this is not a worker process"
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def set_encoder(wordpiece: WordPiece) -> None:
    """Prepares this process for `encode_in_worker`."""
    global _encoder
    _encoder = TextEncoder(wordpiece)


def encode_in_worker(documents: Sequence[str], counted: Sequence[bool]) -> Encoded:
    assert _encoder is not None, "call set_encoder first"
    return _encoder.encode(documents, counted)
