"""Entities in sequences of tags: decoding, and precision, recall and F1 as in CoNLL's evaluation and seqeval.

An entity is correct if its first word, its last word and its type are.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np


def decode(types: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Entities of concatenated sentences, int64 [n, 4]: sentence, first word, the word after the last, type.

    Args:
        types: the entity type of each word, [W]; -1 outside of entities.
        begins: bool [W], whether a word is tagged as the beginning of an entity. A word whose type differs from that of
            the previous word also begins an entity.
        lengths: the number of words in each sentence; their sum is W.
    """
    first_words = np.zeros(len(types), bool)
    first_words[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    before = np.concatenate([[-1], types[:-1]]) if len(types) else types
    inside = types >= 0
    starts = inside & (begins | first_words | (types != before))
    ends = np.flatnonzero(np.append(starts | ~inside, True))
    firsts = np.flatnonzero(starts)
    lasts = ends[np.searchsorted(ends, firsts, side="right")]
    sentences = np.searchsorted(np.cumsum(lengths), firsts, side="right")
    return np.stack([sentences, firsts, lasts, types[firsts]], axis=1).astype(np.int64)


def common(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Entities [n, 4] that are in both arrays."""
    both = set(map(tuple, expected.tolist()))
    return np.array([entity for entity in found.tolist() if tuple(entity) in both], np.int64).reshape(-1, 4)


def precision_recall_f1(right: int, found: int, expected: int) -> tuple[float, float, float]:
    """Precision, recall and F1 from counts of correct, found and expected entities; 0 where they are undefined."""
    return right / max(found, 1), right / max(expected, 1), 2 * right / max(found + expected, 1)


def by_type(found: np.ndarray, expected: np.ndarray, types: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support (number of expected entities) of each type."""
    right = common(found, expected)
    table = {}
    for number, name in enumerate(types):
        counts = [int((entities[:, 3] == number).sum()) for entities in (right, found, expected)]
        precision, recall, f1 = precision_recall_f1(*counts)
        table[name] = {"precision": precision, "recall": recall, "f1": f1, "support": counts[2]}
    return table


Span = dict[str, Any]
"""start, end (characters), label and text."""


def entity_errors(found: list[Span], expected: list[Span]) -> list[dict[str, Any]]:
    """Differences between the predicted and the expected spans of a text: missed, spurious or, where two overlap, a
    wrong type or boundary.

    Args:
        found, expected: in the order of the text; the spans of a list do not overlap.
    """
    right = {_key(span) for span in expected} & {_key(span) for span in found}
    ends = [span["end"] for span in found]
    errors, matched = [], set(right)
    for span in expected:
        if _key(span) in right:
            continue
        first = bisect_right(ends, span["start"])  # the first that ends after the start
        other = found[first] if first < len(found) and found[first]["start"] < span["end"] else None
        if other is None or _key(other) in right:
            errors.append({"error": "missed", "expected": span})
            continue
        matched.add(_key(other))
        same = (other["start"], other["end"]) == (span["start"], span["end"])
        error = "type" if same else "boundary" if other["label"] == span["label"] else "type and boundary"
        errors.append({"error": error, "expected": span, "found": other})
    return errors + [{"error": "spurious", "found": span} for span in found if _key(span) not in matched]


def _key(span: Span) -> tuple[int, int, str]:
    return span["start"], span["end"], span["label"]
