"""Rare words of a corpus and their positions in its shards.

A word is a run of pieces joined by ##, without special tokens. Words are counted by 64-bit hashes while the corpus is
tokenized; when the counts are known, a second pass over the shards finds the positions of the rare words.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastbert.data.encoding import hash_words, sum_by_key, word_starts
from fastbert.data.integrity import FileRecord, compare, save_array, save_json
from fastbert.data.tokenizer import PREFIX, WordPiece
from fastbert.data.workers import in_order
from fastbert.data.writer import shard_file
from fastbert.progress import Progress, progress

MOST_WORDS = 2**23  # distinct words while counting: 128 MB, and three times as much while two tables are merged
PENDING = 2**20
BLOCK_TOKENS = 2**21
SEQUENCE_TOKENS = 128
RARE = ("positions", "lengths", "words")  # fields of RareWords, each in a separate file


class WordCounter:
    """Counts of words by hash, in bounded memory.

    When there are more than `most` distinct words, the least frequent ones are dropped until half of `most` remain.
    This depends only on the order of the corpus. A dropped word that occurs again is counted from zero: `lacking` is
    an upper bound on the occurrences missing from a count.
    """

    def __init__(self, most: int = MOST_WORDS) -> None:
        self.most, self.lacking = most, 0
        self._hashes = np.zeros(0, np.uint64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0

    def add(self, hashes: np.ndarray, counts: np.ndarray) -> None:
        """Adds `counts` (int64) of the words with these `hashes` (uint64)."""
        self._pending.append((hashes, counts))
        self._held += len(hashes)
        if self._held >= max(PENDING, len(self._hashes) // 4):
            self._merge()

    def between(self, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes and the counts of the words with least <= count <= most."""
        self._merge()
        rare = (self._counts >= least) & (self._counts <= most)
        return self._hashes[rare], self._counts[rare]

    def __len__(self) -> int:
        """Number of distinct words."""
        self._merge()
        return len(self._hashes)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `restore`. This merges the counts; if there are too many words, the counts therefore depend on
        when this is called."""
        self._merge()
        return {"hashes": self._hashes, "counts": self._counts, "lacking": np.array(self.lacking)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._hashes, self._counts, self.lacking = arrays["hashes"], arrays["counts"], int(arrays["lacking"])

    def _merge(self) -> None:
        if not self._pending:
            return
        hashes, counts = zip((self._hashes, self._counts), *self._pending, strict=True)
        self._pending, self._held = [], 0
        self._hashes, self._counts = sum_by_key(np.concatenate(hashes), np.concatenate(counts))
        if len(self._hashes) > self.most:
            index = len(self._counts) - self.most // 2 - 1
            dropped = int(np.partition(self._counts, index)[index])
            self.lacking += dropped
            keep = self._counts > dropped
            self._hashes, self._counts = self._hashes[keep], self._counts[keep]


@dataclass(frozen=True)
class RareWords:
    """Occurrences of rare words in part of a shard or split."""

    positions: np.ndarray
    """int64, ascending: position of the first piece of each occurrence, in tokens from the start of the shard or
    split."""
    lengths: np.ndarray
    """uint16: number of pieces."""
    words: np.ndarray
    """int32: index in `Dataset.rare_words`; before that list is sorted, index in the sorted hashes."""


def find_words(tokens_file: Path, start: int, stop: int, hashes_file: Path, wordpiece: WordPiece) -> RareWords:
    """Finds the words among the tokens start ... stop - 1 of a shard whose hash is in `hashes_file` (sorted uint64).

    start and stop must not be within a word. Runs in worker processes.
    """
    tokens = np.load(tokens_file, mmap_mode="r", allow_pickle=False)[start:stop]
    wanted = np.load(hashes_file, allow_pickle=False)
    starts = word_starts(tokens, wordpiece.continuing)
    hashes, lengths = hash_words(tokens, starts)
    # Most words are not rare: a table indexed by 22 bits of the hash excludes nearly all of them before the search.
    hint = np.zeros(2**22, dtype=bool)
    hint[wanted >> np.uint64(42)] = True
    maybe = np.flatnonzero(hint[hashes >> np.uint64(42)])
    index = np.minimum(np.searchsorted(wanted, hashes[maybe]), len(wanted) - 1)
    found = wanted[index] == hashes[maybe]
    rare = maybe[found]
    return RareWords(
        (starts[rare] + start).astype(np.int64), lengths[rare].astype(np.uint16), index[found].astype(np.int32)
    )


def spell(pieces: np.ndarray, wordpiece: WordPiece) -> str:
    """Spelling of the word that a run of ids represents."""
    return "".join(wordpiece.tokens[i] for i in pieces[:1]) + "".join(
        wordpiece.tokens[i].removeprefix(PREFIX) for i in pieces[1:]
    )


def write_rare(
    folder: Path,
    shards: dict[str, list[int]],
    wordpiece: WordPiece,
    hashes: np.ndarray,
    counts: np.ndarray,
    submit: Callable[..., Future],
) -> tuple[dict[str, dict[str, int]], dict[str, list[dict[str, FileRecord]]], FileRecord]:
    """Writes the list of rare words and their positions in every shard.

    Args:
        shards: number of tokens of each shard of each split, the training split first.
        hashes, counts: hashes and counts of the rare words, sorted by hash.
        submit: runs a function with arguments in another process.

    Returns:
        For each split the numbers of occurrences of rare words, of sequences, and of sequences that contain a rare
        word; for each shard of each split the records of its files; the record of the list.
    """
    hashes_file = folder / "hashes.npy"
    np.save(hashes_file, hashes, allow_pickle=False)
    words = [""] * len(hashes)
    figures, files = {}, {split: [] for split in shards}
    with progress("finding rare words", sum(map(sum, shards.values())), "tokens") as work:
        for split, sizes in shards.items():
            occurrences = touched = sequences = 0
            for number, size in enumerate(sizes):
                found = _find_in_shard(folder, split, number, size, hashes_file, wordpiece, submit, work)
                _spell_new(words, found, folder / shard_file(split, number, "tokens"), wordpiece)
                names = {part: shard_file(split, number, f"rare.{part}") for part in RARE}
                files[split].append(
                    {name: save_array(folder / name, getattr(found, part)) for part, name in names.items()}
                )
                occurrences += len(found.words)
                row = SEQUENCE_TOKENS - 1  # the first position of a sequence is [CLS]
                ends = found.positions + np.maximum(found.lengths, 1) - 1
                touched += len(np.union1d(found.positions // row, ends // row))
                sequences += -(-size // row)
            figures[split] = {"occurrences": occurrences, "sequences": sequences, "sequences_touched": touched}
    hashes_file.unlink()

    order = sorted(range(len(words)), key=lambda i: (-counts[i], words[i]))
    number_of = np.empty(len(words), np.int32)
    number_of[order] = np.arange(len(words))
    for split, saved in files.items():
        for number, records in enumerate(saved):
            name = shard_file(split, number, "rare.words")
            compare(folder, {name: records[name]}, "it changed after it was written; check the disk")
            records[name] = save_array(folder / name, number_of[np.load(folder / name, allow_pickle=False)])
    listed = {"words": [words[i] for i in order], "counts": [int(counts[i]) for i in order]}
    return figures, files, save_json(folder / "rare_words.json", listed)


def _find_in_shard(
    folder: Path,
    split: str,
    number: int,
    size: int,
    hashes_file: Path,
    wordpiece: WordPiece,
    submit: Callable[..., Future],
    work: Progress,
) -> RareWords:
    """The rare words of a shard of `size` tokens, found block by block in worker processes."""
    tokens_file = folder / shard_file(split, number, "tokens")
    documents = np.load(folder / shard_file(split, number, "documents"), allow_pickle=False)
    jobs = (
        (stop - start, None, submit(find_words, tokens_file, start, stop, hashes_file, wordpiece))
        for start, stop in _blocks(documents, size)
    )
    parts = []
    for tokens, _, part in in_order(jobs):
        parts.append(vars(part))
        work.update(work.done + tokens)
    return RareWords(**{name: np.concatenate([part[name] for part in parts]) for name in RARE})


def _spell_new(words: list[str], found: RareWords, tokens_file: Path, wordpiece: WordPiece) -> None:
    """Fills in the spelling of the words in `found` that have none yet in `words`."""
    tokens = np.load(tokens_file, mmap_mode="r", allow_pickle=False)
    for word, index in zip(*np.unique(found.words, return_index=True), strict=True):
        if not words[word]:
            position = found.positions[index]
            words[word] = spell(tokens[position : position + found.lengths[index]], wordpiece)


def _blocks(documents: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of blocks of about BLOCK_TOKENS tokens that begin with a document."""
    wanted = np.arange(BLOCK_TOKENS, size, BLOCK_TOKENS)
    starts = documents[np.searchsorted(documents[:-1], wanted)] if len(documents) else wanted[:0]
    borders = np.unique(np.concatenate([[0], starts[starts < size], [size]]))
    return zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
