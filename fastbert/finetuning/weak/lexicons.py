"""Words in texts: keyword lists, and lexicons with scores such as those of vaderSentiment and afinn."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.finetuning.rows import number_in
from fastbert.finetuning.weak.label_models import ABSTAIN
from fastbert.inputs import read_text_input

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Vocabulary:
    """Phrases in lower case and their values."""

    values: Mapping[str, Any]
    longest: int
    """Maximum number of words in a phrase."""


def vocabulary(values: Mapping[str, Any]) -> Vocabulary:
    return Vocabulary(values, max(len(phrase.split()) for phrase in values))


def matches(text: str, table: Vocabulary) -> Iterator[Any]:
    """Values of the phrases in a text, the longest phrase at each word, without overlaps.

    Words are separated by white space; one that is not in the table, such as "good," or "(bad)", is reduced to letters
    and digits.
    """
    pieces = text.lower().split()
    tokens = [
        token for piece in pieces for token in ((piece,) if piece in table.values else _WORD.findall(piece) or (piece,))
    ]
    start = 0
    while start < len(tokens):
        for count in range(min(table.longest, len(tokens) - start), 0, -1):
            phrase = " ".join(tokens[start : start + count])
            if phrase in table.values:
                yield table.values[phrase]
                start += count
                break
        else:
            start += 1


def best_label(counts: list[int]) -> int:
    """The label with the highest count; `ABSTAIN` without any, and for a tie."""
    most = max(counts)
    return counts.index(most) if most and counts.count(most) == 1 else ABSTAIN


def read_words(path: Path) -> list[str]:
    """The words or phrases in a text file, one a line; raises a UserError if there are none."""
    found = [line.strip() for line in read_text_input(path, "word list").splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path} holds no words; write one a line")
    return found


def read_lexicon(path: Path) -> dict[str, float]:
    """Phrase in lower case -> score, from lines of a phrase, a tab and a score; further fields are ignored. A phrase
    on several lines has the mean of their scores.

    Raises:
        UserError: a line has another form, or there is none.
    """
    found: dict[str, list[float]] = {}
    for number, line in enumerate(read_text_input(path, "lexicon").splitlines(), 1):
        if not line.strip():
            continue
        phrase, *rest = line.split("\t")
        score = number_in(rest[0]) if rest else None
        if score is None or abs(score) == float("inf") or score != score or not phrase.strip():
            raise UserError(f"{path}, line {number}: {brief(line)} is not a word, a tab and a number; fix the line")
        found.setdefault(" ".join(phrase.lower().split()), []).append(score)
    if not found:
        raise UserError(f"{path} holds no words; write a word, a tab and a number on each line")
    return {phrase: sum(scores) / len(scores) for phrase, scores in found.items()}
