"""Rare words: which words a corpus holds a few times, and where they stand in its shards.

A word is a run of pieces joined by ##; special tokens are none. Counting is done on 64-bit hashes while the corpus is
tokenized; once the counts are known, a second look at the shards finds the places of the rare ones.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastbert.data.encoding import hash_words, sum_by_key, word_starts
from fastbert.data.tokenizer import PREFIX, WordPiece

MOST_WORDS = 2**23  # distinct words held while counting: 128 MB, three times that while two tables are merged
PENDING = 2**20


class WordCounter:
    """Counts of words by hash, in bounded memory.

    With more than `most` distinct words, the least frequent so far are dropped until half of that is left, in the
    order of the corpus and thus always the same. A word that comes back later is counted anew: what a count may lack
    at most is `lacking`.
    """

    def __init__(self, most: int = MOST_WORDS) -> None:
        self.most, self.lacking = most, 0
        self._hashes = np.zeros(0, np.uint64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0

    def add(self, hashes: np.ndarray, counts: np.ndarray) -> None:
        """Adds `counts` (int64) of the words `hashes` (uint64)."""
        self._pending.append((hashes, counts))
        self._held += len(hashes)
        if self._held >= max(PENDING, len(self._hashes) // 4):
            self._merge()

    def between(self, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (sorted) and counts of the words with least <= count <= most."""
        self._merge()
        rare = (self._counts >= least) & (self._counts <= most)
        return self._hashes[rare], self._counts[rare]

    def __len__(self) -> int:
        """Distinct words held."""
        self._merge()
        return len(self._hashes)

    def _merge(self) -> None:
        if not self._pending:
            return
        hashes, counts = zip((self._hashes, self._counts), *self._pending, strict=True)
        self._pending, self._held = [], 0
        self._hashes, self._counts = sum_by_key(np.concatenate(hashes), np.concatenate(counts))
        if len(self._hashes) > self.most:
            place = len(self._counts) - self.most // 2 - 1
            dropped = int(np.partition(self._counts, place)[place])
            self.lacking += dropped
            keep = self._counts > dropped
            self._hashes, self._counts = self._hashes[keep], self._counts[keep]


@dataclass(frozen=True)
class Places:
    """Where rare words stand in (a part of) a shard."""

    positions: np.ndarray
    """int64, ascending: the first piece of each, counted in tokens from the shard's beginning."""
    lengths: np.ndarray
    """uint16: pieces."""
    words: np.ndarray
    """int32: which one, by its place among the sorted hashes."""


def find_words(tokens_file: Path, start: int, stop: int, hashes_file: Path, wordpiece: WordPiece) -> Places:
    """The words of tokens start ... stop - 1 of a shard whose hash is in `hashes_file` (sorted uint64).

    start and stop must not lie within a word. Runs in worker processes.
    """
    tokens = np.load(tokens_file, mmap_mode="r", allow_pickle=False)[start:stop]
    wanted = np.load(hashes_file, allow_pickle=False)
    starts = word_starts(tokens, wordpiece.continuing)
    hashes, lengths = hash_words(tokens, starts)
    # Most words are not rare: a table of 22 of the hash's bits spares nearly all of them the binary search.
    hint = np.zeros(2**22, dtype=bool)
    hint[wanted >> np.uint64(42)] = True
    special = np.zeros(len(wordpiece.tokens), dtype=bool)
    special[list(wordpiece.special_ids)] = True
    maybe = np.flatnonzero(hint[hashes >> np.uint64(42)])
    maybe = maybe[~special[tokens[starts[maybe]]]]
    if not len(wanted):
        maybe = maybe[:0]
    place = np.minimum(np.searchsorted(wanted, hashes[maybe]), max(len(wanted) - 1, 0))
    found = wanted[place] == hashes[maybe] if len(maybe) else np.zeros(0, bool)
    rare = maybe[found]
    return Places(
        (starts[rare] + start).astype(np.int64), lengths[rare].astype(np.uint16), place[found].astype(np.int32)
    )


def spell(pieces: np.ndarray, wordpiece: WordPiece) -> str:
    """The word that a run of ids stands for."""
    return "".join(wordpiece.tokens[i] for i in pieces[:1]) + "".join(
        wordpiece.tokens[i].removeprefix(PREFIX) for i in pieces[1:]
    )
