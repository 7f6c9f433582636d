"""Texts of an audit that occur in the text that the model was pretrained on.

A text of at least `GRAM` words occurs if each of its runs of `GRAM` words is somewhere in the pretraining text. Case,
Unicode form and punctuation make no difference. Shorter texts are not searched: common phrases are everywhere. Memory
grows with the texts of the audit only.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastbert.data.sources import open_source
from fastbert.dataset_work.audit.pool import normalized
from fastbert.finetuning.rows import Example
from fastbert.progress import progress

GRAM = 8  # words
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """Examples whose first or second text occurs in the pretraining text."""

    found: np.ndarray
    """bool [N]."""
    long_enough: int
    """Number of examples with a text of at least `GRAM` words."""


def words_of(text: str) -> list[str]:
    return _WORD.findall(normalized(text))


def runs_of(words: Sequence[str]) -> Iterable[str]:
    """Each run of `GRAM` words, joined by spaces."""
    return (" ".join(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1))


def pretraining_overlap(examples: Sequence[Example], source: str) -> Overlap:
    """Searches the texts in a source of `prepare`.

    Raises:
        UserError: the source cannot be read.
    """
    texts: list[tuple[int, set[str]]] = []  # (example, its runs)
    for row, example in enumerate(examples):
        for text in (example.text, example.pair or ""):
            if runs := set(runs_of(words_of(text))):
                texts.append((row, runs))
    wanted = set().union(*(runs for _, runs in texts)) if texts else set()
    seen: set[str] = set()
    opened = open_source(source)
    with progress("reading the pretraining text", opened.size) as shown:
        for document in opened.documents():
            seen.update(run for run in runs_of(words_of(document)) if run in wanted)
            shown.update(opened.position)
    found = np.zeros(len(examples), dtype=bool)
    for row, runs in texts:
        found[row] |= runs <= seen
    return Overlap(found, len({row for row, _ in texts}))
