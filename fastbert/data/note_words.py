"""Rare words of the note dictionary (arXiv 2008.01466): choice of the words, and their positions in the rows.

The index arrays are made on the host while batches are read, with a few fixed shapes. A word
that is cut by the end of a row is ignored there.

Shapes: R occurrences and P tokens of a micro-batch, U distinct words of a global batch, each padded to a multiple of
BUCKET with at least one padding entry; E windows of W tokens, padded to one of a few sizes.
"""

import hashlib
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from fastbert.data.encoding import hash_words, spread, word_starts
from fastbert.data.note_index import note_index
from fastbert.data.shards import Dataset, TokenStream
from fastbert.errors import UserError
from fastbert.progress import progress

BUCKET = 64
SENTENCE = 25  # words; the paper counts sentences
PIECES = 4  # of a word in one window; a longer window is split
BLOCK_TOKENS = 2**24  # tokens read at a time while words are chosen
SAMPLE_TOKENS = 2**24  # tokens read to suggest another range of counts


@dataclass(frozen=True)
class StepWords:
    """The distinct words with notes in a global batch, which are the same in every process of a run."""

    words: np.ndarray
    """int64, ascending: rows of the dictionary."""
    counts: np.ndarray
    """int64: occurrences in the global batch."""


@dataclass(frozen=True)
class ContextWindows:
    """The contexts of the occurrences in a micro-batch: windows of at most W tokens. A context that is longer, because
    its word has many pieces, is split into several windows."""

    slots: Tensor
    """int64 [E]: index of the context's word in `Occurrences.words`; padding has the last."""
    firsts: Tensor
    """int64 [E]: position of the first token."""
    lengths: Tensor
    """int64 [E]: number of tokens, 0 for padding."""
    totals: Tensor
    """int64 [E]: number of tokens of the whole context, 1 for padding."""
    size: int
    """W."""
    whole_rows: bool
    """True if there are more windows than expected, so that they would not have one of the few sizes."""


@dataclass(frozen=True)
class Occurrences:
    """Occurrences of words with notes in a micro-batch [B, T]. Positions are indices into B T tokens."""

    words: Tensor
    """int64 [U]: rows of the dictionary, each once; padding repeats row 0 with a count of 0."""
    counts: Tensor
    """int64 [U]: occurrences in the global batch."""
    slots: Tensor
    """int64 [R]: index in `words` of each occurrence; padding has the last index, which is padding too."""
    firsts: Tensor
    """int64 [R]: position of the first piece."""
    lengths: Tensor
    """int64 [R]: number of pieces, 0 for padding."""
    tokens: Tensor
    """int64 [P]: positions of all pieces; 0 for padding."""
    owners: Tensor
    """int64 [P]: index of the occurrence to which each token belongs; padding has the last, which is padding too."""
    windows: ContextWindows


def choose_words(dataset: Dataset, least: int, most: int, fraction: float) -> np.ndarray:
    """Selects words that occur least ... most times, in the order of a hash of their spelling, until this `fraction` of
    the training text, in segments of SENTENCE words on average, contains one; or all such words if there are too few.
    The choice depends only on the corpus and these arguments, and not on the length of a sequence.

    Args:
        least, most: range of the occurrences in the training split.

    Returns:
        int32 [rare words of the dataset]: row of each word in the dictionary, -1 for words without a note.

    Raises:
        UserError: the range of counts exceeds the prepared one, or no word is in it.
    """
    made = dataset.record["options"]
    if least < made["rare_min"] or most > made["rare_max"]:
        raise UserError(
            f"the note dictionary needs words that occur {least} to {most} times, but {dataset.folder} lists words "
            f"that occur {made['rare_min']} to {made['rare_max']} times: choose --notes.min-count and "
            f"--notes.max-count within this range, or prepare it again with --rare-min {min(least, made['rare_min'])} "
            f"--rare-max {max(most, made['rare_max'])} and another --out"
        )
    counts = dataset.rare_counts
    band = np.flatnonzero((counts >= least) & (counts <= most))
    if not len(band):
        raise UserError(_no_words(dataset, least, most))
    none = np.iinfo(np.int32).max
    rank = np.full(len(counts), none, np.int32)
    rank[sorted(band, key=lambda word: hashlib.sha256(dataset.rare_words[word].encode()).digest())] = np.arange(
        len(band)
    )

    stream = dataset.split("train")
    width = segment_tokens(dataset)
    block = width * max(1, BLOCK_TOKENS // width)
    first_words = np.zeros(len(band), np.int64)  # by rank: segments in which no word has a lower one
    with progress("choosing words for the note dictionary", len(stream), "tokens") as work:
        for start in range(0, len(stream), block):
            stop = min(start + block, len(stream))
            found = stream.rare(start, stop)
            lowest = np.full(math.ceil((stop - start) / width), none, np.int32)
            np.minimum.at(lowest, (found.positions - start) // width, rank[found.words])
            first_words += np.bincount(lowest[lowest < none], minlength=len(band))
            work.update(stop)
    touched = first_words.cumsum()
    wanted = min(int(touched[-1]), math.ceil(fraction * math.ceil(len(stream) / width)))
    chosen = rank <= np.searchsorted(touched, wanted)
    return np.where(chosen, np.cumsum(chosen) - 1, -1).astype(np.int32)


def segment_tokens(dataset: Dataset) -> int:
    """Tokens of a segment with SENTENCE words on average, at least 1."""
    train = dataset.record["splits"]["train"]
    return max(1, round(SENTENCE * train["tokens"] / max(1, train["words"])))


def _no_words(dataset: Dataset, least: int, most: int) -> str:
    """Error message for a range of counts without words, with the nearest wider range that has words; ranges with rarer
    words are tried first."""
    listed = len(dataset.rare_words) > 0
    counts = dataset.rare_counts if listed else _all_counts(dataset)
    made = dataset.record["options"]
    lowest, highest = (made["rare_min"], made["rare_max"]) if listed else (1, 2**31)
    problem = f"no word of {dataset.folder} occurs {least} to {most} times"
    rarer = [(max(lowest, least >> power), most) for power in range(1, 32)]
    commoner = [(least, min(highest, most << power)) for power in range(1, 32)]
    for low, high in rarer + commoner:
        if number := int(((counts >= low) & (counts <= high)).sum()):
            found = f"{problem}; {number:,} words occur {low} to {high} times"
            flags = f"--notes.min-count {low} --notes.max-count {high}"
            if listed:
                return f"{found}: {flags}"
            return f"{found}: prepare it again with --rare-min {low} --rare-max {high} and another --out, then {flags}"
    return f"{problem}, nor is any other word; prepare it from more text"


def _all_counts(dataset: Dataset) -> np.ndarray:
    """Counts of the words of the training split, extrapolated from its first tokens if it is long."""
    stream = dataset.split("train")
    tokens = stream.read(0, min(len(stream), SAMPLE_TOKENS))
    starts = word_starts(tokens, dataset.wordpiece.continuing)
    hashes, _ = hash_words(tokens, starts)
    real = ~np.isin(tokens[starts], dataset.wordpiece.special_ids)
    return np.unique(hashes[real], return_counts=True)[1] * len(stream) // len(tokens)


@dataclass(frozen=True)
class Found:
    """Occurrences in rows of a split, in the order of the rows. All arrays are int64 [R]."""

    rows: np.ndarray
    """Index of the row among those that were searched."""
    positions: np.ndarray
    """Position of the first piece among the row's tokens of the stream."""
    lengths: np.ndarray
    """Number of pieces."""
    words: np.ndarray
    """Row of the word in the dictionary."""
    lefts: np.ndarray
    """Tokens of the document before the first piece, at most those of a row."""
    rights: np.ndarray
    """Tokens of the document from the first piece on, without its [SEP], at most those of a row."""


class NoteWords:
    """Occurrences of the chosen words in the rows of a split, mapped into memory."""

    def __init__(
        self, stream: TokenStream, row_of_word: np.ndarray, length: int, half_window: int, folder: Path | None = None
    ) -> None:
        """
        Args:
            row_of_word: result of `choose_words`.
            length: T.
            half_window: k, tokens of context on either side of a word.
            folder: folder of their index, by `index_folder`; None writes a temporary one.
        """
        self.width, self.half_window, self.rows = length - 1, half_window, len(stream) // (length - 1)
        self.index = note_index(stream, row_of_word, self.width, folder)
        rows, tokens, index = max(1, self.rows), length, self.index
        mean = len(index.positions) / rows
        variance = index.squares / rows - mean**2
        self.frequencies = NoteFrequencies(mean / tokens, variance / tokens, index.tokens / rows / tokens)
        """Frequencies in the split."""

    def find(self, rows: np.ndarray) -> Found:
        """The occurrences in these rows of the split."""
        starts, index = np.asarray(rows, dtype=np.int64) * self.width, self.index
        first, stop = (np.searchsorted(index.positions, border) for border in (starts, starts + self.width))
        here, row = spread(first, stop - first), np.repeat(np.arange(len(starts)), stop - first)
        others = (array[here].astype(np.int64) for array in (index.lengths, index.words, index.lefts, index.rights))
        return Found(row, index.positions[here] - starts[row], *others)

    def step_words(self, rows: np.ndarray) -> StepWords:
        """The words in the rows of a whole global batch."""
        return StepWords(*np.unique(self.find(rows).words, return_counts=True))

    def read(self, rows: np.ndarray, step: StepWords) -> Occurrences:
        """The occurrences in these rows, a part of the global batch with the words `step`, in memory of the host.

        A window has up to k tokens on either side of the word, within its row and its document. It excludes [CLS] and
        the [SEP] after a document, which represent no word.
        """
        found = self.find(rows)
        position, length = found.positions, found.lengths
        first = np.maximum(position - np.minimum(found.lefts, self.half_window), 0)
        stop = np.minimum(position + np.minimum(found.rights, length + self.half_window), self.width)
        offset = found.rows * (self.width + 1) + 1  # a row of the batch begins with its [CLS]
        slots = np.searchsorted(step.words, found.words)

        real = int(length.sum())
        distinct, occurrences, tokens = _bucket(len(step.words)), _bucket(len(length)), _bucket(real)
        of_words = np.zeros((2, distinct), np.int64)
        of_words[:, : len(step.words)] = step.words, step.counts
        of_occurrences = np.zeros((3, occurrences), np.int64)
        of_occurrences[0] = distinct - 1
        of_occurrences[:, : len(length)] = slots, position + offset, length
        of_tokens = np.zeros((2, tokens), np.int64)
        of_tokens[1] = occurrences - 1
        of_tokens[:, :real] = spread(position + offset, length), np.repeat(np.arange(len(length)), length)
        arrays = (array for part in (of_words, of_occurrences, of_tokens) for array in part)
        windows = self._windows(slots, first + offset, stop - first, len(rows), distinct)
        return Occurrences(*map(torch.from_numpy, arrays), windows)

    def _windows(
        self, slots: np.ndarray, firsts: np.ndarray, lengths: np.ndarray, rows: int, distinct: int
    ) -> ContextWindows:
        """The contexts of a micro-batch of `rows` rows with `distinct` words, in windows."""
        size = window_size(self.half_window, self.width + 1)
        parts = -(-lengths // size)
        context = np.repeat(np.arange(len(lengths)), parts)
        before = spread(np.zeros_like(parts), parts) * size  # tokens of the context in front of each of its windows
        sizes = window_sizes(self.frequencies, rows, self.width + 1, size)
        padded = next((count for count in sizes if count >= len(context)), None)
        of_windows = np.zeros((4, padded or _bucket(len(context))), np.int64)
        of_windows[0], of_windows[3] = distinct - 1, 1
        left = np.minimum(lengths[context] - before, size)
        of_windows[:, : len(context)] = slots[context], firsts[context] + before, left, lengths[context]
        return ContextWindows(*map(torch.from_numpy, of_windows), size, padded is None)


class JoinedNoteWords(NoteWords):
    """Occurrences in the rows of two splits behind each other."""

    def __init__(self, first: NoteWords, second: NoteWords, border: int, fraction: float) -> None:
        """
        Args:
            border: first row of the second split.
            fraction: fraction of the rows that are read from the second split.
        """
        self.width, self.half_window, self.rows = first.width, first.half_window, border + second.rows
        self.first, self.second, self.border = first, second, border
        self.frequencies = first.frequencies.mixed(second.frequencies, fraction, self.width + 1)

    def find(self, rows: np.ndarray) -> Found:
        rows = np.asarray(rows, dtype=np.int64)
        parts = []
        for part, here, start in (
            (self.first, np.flatnonzero(rows < self.border), 0),
            (self.second, np.flatnonzero(rows >= self.border), self.border),
        ):
            found = part.find(rows[here] - start)
            parts.append(replace(found, rows=here[found.rows]))
        order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
        return Found(*(np.concatenate([getattr(part, f.name) for part in parts])[order] for f in fields(Found)))


def window_size(half_window: int, length: int) -> int:
    """W for rows of `length` tokens."""
    return min(2 * half_window + PIECES, length - 1)


@dataclass(frozen=True)
class NoteFrequencies:
    """Frequencies of words with notes, per token."""

    occurrences: float = 0.0
    variance: float = 0.0
    """Variance of the number of occurrences in a row, divided by the row's tokens."""
    pieces: float = 0.0

    def mixed(self, other: "NoteFrequencies", fraction: float, length: int) -> "NoteFrequencies":
        """Frequencies in rows of `length` tokens of which this `fraction` have those of `other`."""
        weights = ((self, 1 - fraction), (other, fraction))
        mean, pieces = (
            sum(weight * getattr(one, name) for one, weight in weights) for name in ("occurrences", "pieces")
        )
        square = sum(weight * (one.variance + one.occurrences**2 * length) for one, weight in weights)
        return NoteFrequencies(mean, max(0.0, square - mean**2 * length), pieces)


def window_sizes(frequencies: NoteFrequencies, rows: int, length: int, size: int) -> dict[int, float]:
    """The numbers E to which the windows of a micro-batch are padded, so that there are few distinct shapes, and the
    approximate fraction of the micro-batches with each; the others have more windows. A number that has more tokens
    than the whole rows is left out.

    Args:
        rows, length: shape of the micro-batch, [B, T].
        size: W.
    """
    tokens = rows * length
    expected, deviation = frequencies.occurrences * tokens, math.sqrt(frequencies.variance * tokens)
    unit = 8 if expected > 12 else 1
    counts = sorted({unit * math.ceil((expected + more * deviation) / unit) for more in (0.25, 1.0, 2.5)})
    found, below = {}, 0.0
    for count in counts:
        if 0 < count * size < tokens:
            fraction = NormalDist(expected, max(deviation, 1e-9)).cdf(count + 0.5)
            found[count], below = fraction - below, fraction
    return found


def _bucket(count: int) -> int:
    """Next multiple of BUCKET above `count`, so that there are few distinct shapes."""
    return (count // BUCKET + 1) * BUCKET
