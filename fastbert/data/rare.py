"""Rare words of a corpus and their positions in its shards.

A word is a run of pieces joined by ##, without special tokens. Words are counted by 64-bit hashes while the corpus is
tokenized; when the counts are known, a second pass over the shards finds the positions of the rare words.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastbert.data.encoding import hash_words, word_starts
from fastbert.data.integrity import ArrayWriter, FileRecord, compare, save_json
from fastbert.data.tally import sums
from fastbert.data.tokenizer import PREFIX, WordPiece
from fastbert.data.workers import in_order
from fastbert.data.writer import shard_file
from fastbert.progress import Progress, progress

BLOCK_TOKENS = 2**21
SEQUENCE_TOKENS = 128
RARE = {"positions": np.int64, "lengths": np.uint16, "words": np.int32}
"""Fields of RareWords, each in a separate file."""


def rare_hashes(runs: Iterable[Path], least: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Sorted hashes and counts of the words that occur least ... most times, and the number of distinct words, from the
    `runs` of tallies of words, as for `tally.sums`."""
    hashes, counts, distinct = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for words, often in sums(runs):
        rare = (often >= least) & (often <= most)
        hashes.append(words[rare])
        counts.append(often[rare])
        distinct += len(words)
    return np.concatenate(hashes), np.concatenate(counts), distinct


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
    figures = {split: _Figures() for split in shards}
    files: dict[str, list[dict[str, FileRecord]]] = {split: [] for split in shards}
    with progress("finding rare words", sum(map(sum, shards.values())), "tokens") as work:
        for split, sizes in shards.items():
            for number, size in enumerate(sizes):
                writers = {
                    part: ArrayWriter(folder / shard_file(split, number, f"rare.{part}"), dtype)
                    for part, dtype in RARE.items()
                }
                for found in _find_in_shard(folder, split, number, size, hashes_file, wordpiece, submit, work):
                    _spell_new(words, found, folder / shard_file(split, number, "tokens"), wordpiece)
                    for part, writer in writers.items():
                        writer.append(getattr(found, part))
                    figures[split].add(found)
                files[split].append({writer.path.name: writer.close() for writer in writers.values()})
                figures[split].tokens += size
    hashes_file.unlink()

    order = sorted(range(len(words)), key=lambda i: (-counts[i], words[i]))
    number_of = np.empty(len(words), np.int32)
    number_of[order] = np.arange(len(words))
    for split, written in files.items():
        for number, records in enumerate(written):
            name = shard_file(split, number, "rare.words")
            compare(folder, {name: records[name]}, "it changed after it was written; check the disk")
            records[name] = _number_words(folder / name, number_of)
    listed = {"words": [words[i] for i in order], "counts": [int(counts[i]) for i in order]}
    record = save_json(folder / "rare_words.json", listed)
    return {split: found.record() for split, found in figures.items()}, files, record


class _Figures:
    """Numbers of occurrences of rare words, of sequences, and of sequences with a rare word, in a split. They do not
    depend on where shards end."""

    def __init__(self) -> None:
        self.tokens = self.occurrences = self.touched = 0
        self._last = -1  # the last sequence with a rare word

    def add(self, found: RareWords) -> None:
        """Counts the next words of the shard that begins after `tokens` tokens."""
        row = SEQUENCE_TOKENS - 1  # the first position of a sequence is [CLS]
        starts = found.positions + self.tokens
        ends = starts + np.maximum(found.lengths, 1) - 1
        sequences = np.union1d(starts // row, ends // row)
        self.occurrences += len(starts)
        self.touched += int((sequences > self._last).sum())
        self._last = max([self._last, *sequences[-1:].tolist()])

    def record(self) -> dict[str, int]:
        """Entry of dataset.json."""
        sequences = -(-self.tokens // (SEQUENCE_TOKENS - 1))
        return {"occurrences": self.occurrences, "sequences": sequences, "sequences_touched": self.touched}


def _number_words(path: Path, number_of: np.ndarray) -> FileRecord:
    """Replaces the indices in a file by those in `number_of`, a block at a time; returns its new record."""
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    writer = ArrayWriter(path.with_suffix(".new"), RARE["words"])
    for first in range(0, len(found), BLOCK_TOKENS):
        writer.append(number_of[found[first : first + BLOCK_TOKENS]])
    record = writer.close()
    writer.path.replace(path)
    return record


def _find_in_shard(
    folder: Path,
    split: str,
    number: int,
    size: int,
    hashes_file: Path,
    wordpiece: WordPiece,
    submit: Callable[..., Future],
    work: Progress,
) -> Iterator[RareWords]:
    """Yields the rare words of a shard of `size` tokens, found block by block in worker processes."""
    tokens_file = folder / shard_file(split, number, "tokens")
    documents = np.load(folder / shard_file(split, number, "documents"), allow_pickle=False)
    jobs = (
        (stop - start, None, submit(find_words, tokens_file, start, stop, hashes_file, wordpiece))
        for start, stop in _blocks(documents, size)
    )
    for tokens, _, found in in_order(jobs):
        yield found
        work.update(work.done + tokens)


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
