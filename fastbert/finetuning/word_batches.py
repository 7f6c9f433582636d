"""Encoding of texts in which words have labels: each word is scored once, at its first piece; long texts are split into
windows.

Windows overlap by up to a quarter of their length. The first of two scores the first half of the words in the overlap,
the second the rest, so every word is scored in the window with more context.
"""

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.finetuning.batches import TEXTS_AT_A_TIME, EncodedSplit, ranges
from fastbert.finetuning.rows import Example

OVERLAP = 0.25
"""Maximum fraction of the pieces of a window that the next one repeats."""


def windows(pieces: np.ndarray, room: int) -> list[tuple[int, int]]:
    """(first word, the word after the last) of each window over a text.

    Args:
        pieces: number of pieces of each word, [W], each at most `room`.
        room: number of pieces in a window.
    """
    ends = np.concatenate([[0], np.cumsum(pieces)])
    found, start = [], 0
    while True:
        end = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        found.append((start, end))
        if end == len(pieces):
            return found
        # The next window ends at least one word later than this one, and begins as early as room and overlap allow.
        earliest = max(ends[end] - int(OVERLAP * room), ends[end + 1] - room)
        start = max(int(np.searchsorted(ends, earliest)), start + 1)


def scored_words(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Ranges of the words that each window scores: each of the `count` words once, and at least one word per window."""
    cuts = [0, *((second + end) // 2 for (_, end), (second, _) in pairwise(spans)), count]
    return list(pairwise(cuts))


def encode_words(examples: Sequence[Example], vocabulary: AnyTokenizer, max_length: int, ignored: int) -> EncodedSplit:
    """[CLS] pieces [SEP] for each window, at most `max_length` tokens. A word without pieces becomes [UNK], and a word
    that is longer than a window is truncated.

    Args:
        examples: with the ranges of their words; all with labels or none.
        ignored: label of tokens that are not scored.
    """
    cls, sep = vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"]
    room = max_length - 2
    known: dict[str, int] = {}  # distinct word -> number; the pieces of a word do not depend on its neighbors
    word = np.fromiter(
        (known.setdefault(e.text[start:end], len(known)) for e in examples for start, end in e.words), np.int64
    )
    pieces, begins = _pieces_of_words(list(known), vocabulary)
    sizes = np.diff(begins)
    units = np.concatenate([[0], np.cumsum([len(example.words) for example in examples])]).astype(np.int64)
    too_long = np.concatenate([[0], np.cumsum(sizes[word] > room)])
    sizes = np.minimum(sizes, room)
    before = np.concatenate([[0], np.cumsum(sizes[word])])  # pieces before each word, over all texts

    rows = []  # for each window: first word, the word after the last, and the same for the words that it scores
    for start, end in pairwise(units.tolist()):
        if before[end] - before[start] <= room:
            rows.append((start, end, start, end))
            continue
        spans = windows(sizes[word[start:end]], room)
        scored = scored_words(spans, end - start)
        rows += [(start + a, start + b, start + c, start + d) for (a, b), (c, d) in zip(spans, scored, strict=True)]
    first, end, low, high = np.array(rows, np.int64).reshape(-1, 4).T
    lengths = before[end] - before[first] + 2
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    inside = np.ones(starts[-1], bool)
    inside[starts[:-1]] = inside[starts[1:] - 1] = False
    tokens = np.full(starts[-1], sep, np.int32)
    tokens[starts[:-1]] = cls
    words = ranges(first, end)
    distinct = word[words]
    tokens[inside] = pieces[ranges(begins[distinct], begins[distinct] + sizes[distinct])]
    at_first = np.flatnonzero(inside)[np.cumsum(sizes[distinct]) - sizes[distinct]]  # the first piece of each word
    flat = np.zeros(starts[-1], bool)
    flat[at_first] = (np.repeat(low, end - first) <= words) & (words < np.repeat(high, end - first))
    labels = None
    if examples and examples[0].label is not None:
        labels = np.full(len(flat), ignored, np.int64)
        labels[flat] = np.fromiter(chain.from_iterable(example.label for example in examples), np.int64)
    return EncodedSplit(
        tokens=tokens,
        starts=starts,
        firsts=lengths,
        labels=labels,
        truncated=int((np.diff(too_long[units]) > 0).sum()),
        max_length=max_length,
        pad=vocabulary.ids["[PAD]"],
        is_pair=False,
        scored=flat,
        ignored=ignored,
        units=units,
    )


def _pieces_of_words(words: list[str], vocabulary: AnyTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated pieces of words, int32, and the index at which each word begins, int64 [W + 1]; [UNK] for a word
    without pieces."""
    tokenizer, unk = vocabulary.build_for_words(), [vocabulary.ids["[UNK]"]]
    pieces, sizes = [np.zeros(0, np.int32)], [0]
    for at in range(0, len(words), TEXTS_AT_A_TIME):
        part = [[word] for word in words[at : at + TEXTS_AT_A_TIME]]
        found = tokenizer.encode_batch_fast(part, is_pretokenized=True, add_special_tokens=False)
        ids = [encoding.ids or unk for encoding in found]
        pieces.append(np.fromiter(chain.from_iterable(ids), np.int32))
        sizes += map(len, ids)
    return np.concatenate(pieces), np.cumsum(sizes)
