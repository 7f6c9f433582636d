"""Texts with labels of words to ids: each word is scored at its first piece, once, and a long text is read in windows.

Windows overlap by up to a quarter of their length. Of two that overlap, the first scores the first half of the words
that both hold, so every word is scored with the more context of the two.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fastbert.data.tokenizer import WordPiece
from fastbert.finetuning.batches import TEXTS_AT_A_TIME, EncodedSplit
from fastbert.finetuning.rows import Example

OVERLAP = 0.25
"""Of the pieces of a window, at most."""


def windows(pieces: np.ndarray, room: int) -> list[tuple[int, int]]:
    """(first word, the word after the last) of each window over a text.

    Args:
        pieces: of each word, [W], each at most `room`.
        room: pieces of a window.
    """
    ends = np.concatenate([[0], np.cumsum(pieces)])
    found, start = [], 0
    while True:
        end = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        found.append((start, end))
        if end == len(pieces):
            return found
        # The next holds a word more than this one, and begins as early as room and overlap allow.
        earliest = max(ends[end] - int(OVERLAP * room), ends[end + 1] - room)
        start = max(int(np.searchsorted(ends, earliest)), start + 1)


def scored_words(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The words that each window scores; together all `count`, each once, and every window some."""
    cuts = [0, *((second + end) // 2 for (_, end), (second, _) in pairwise(spans)), count]
    return list(pairwise(cuts))


def encode_words(examples: Sequence[Example], vocabulary: WordPiece, max_length: int, ignored: int) -> EncodedSplit:
    """[CLS] pieces [SEP] for each window, at most `max_length` tokens; a word that the tokenizer reads nothing of is
    [UNK], and one that is longer than a window is cut.

    Args:
        examples: with the ranges of their words; all with labels or none.
        ignored: the label of tokens that are not scored.
    """
    tokenizer = vocabulary.build()
    cls, sep, unk = (vocabulary.ids[token] for token in ("[CLS]", "[SEP]", "[UNK]"))
    room, truncated = max_length - 2, 0
    rows: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for at in range(0, len(examples), TEXTS_AT_A_TIME):
        part = examples[at : at + TEXTS_AT_A_TIME]
        texts = [[example.text[start:end] for start, end in example.words] for example in part]
        encodings = tokenizer.encode_batch(texts, is_pretokenized=True, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            words = _pieces_of_words(encoding.ids, encoding.word_ids, len(text), unk)
            truncated += any(len(word) > room for word in words)
            words = [word[:room] for word in words]
            spans = windows(np.array([len(word) for word in words]), room)
            for (first, end), (low, high) in zip(spans, scored_words(spans, len(words)), strict=True):
                rows.append(np.array([cls, *(i for word in words[first:end] for i in word), sep], np.int32))
                flags = [(n == 0 and low <= word < high) for word in range(first, end) for n in range(len(words[word]))]
                scored.append(np.array([False, *flags, False]))
    lengths = [len(row) for row in rows]
    flat = np.concatenate(scored) if scored else np.zeros(0, bool)
    labels = None
    if examples and examples[0].label is not None:
        labels = np.full(len(flat), ignored, np.int64)
        labels[flat] = np.concatenate([np.array(example.label, np.int64) for example in examples])
    return EncodedSplit(
        tokens=np.concatenate(rows) if rows else np.zeros(0, np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        firsts=np.array(lengths, np.int64),
        labels=labels,
        truncated=truncated,
        max_length=max_length,
        pad=vocabulary.ids["[PAD]"],
        is_pair=False,
        scored=flat,
        ignored=ignored,
        units=np.concatenate([[0], np.cumsum([len(example.words) for example in examples])]).astype(np.int64),
    )


def _pieces_of_words(ids: list[int], word_ids: list[int | None], count: int, unk: int) -> list[list[int]]:
    words: list[list[int]] = [[] for _ in range(count)]
    for piece, word in zip(ids, word_ids, strict=True):
        words[word].append(piece)
    return [word or [unk] for word in words]
