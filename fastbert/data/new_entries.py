"""Choice of the entries that extend a WordPiece vocabulary, from the counts of the words of a text.

WordPiece cuts a word greedily: at each index the longest entry that matches is used. So a new entry changes only words
in which it matches at the beginning of a piece, and that piece is the longest proper prefix of it in the vocabulary.
"""

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from fastbert.data.tokenizer import WORTH, WordPiece, pieces_of
from fastbert.data.tokenizer_files import PREFIX

LEAST = 2  # an entry must occur at least this often


@dataclass(frozen=True)
class NewEntries:
    """Entries to append to a vocabulary, in the order of their ids."""

    characters: tuple[str, ...]
    """Characters whose absence makes words [UNK], at the beginning of a word and, with ##, within one."""
    words: tuple[str, ...]
    pieces: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.characters + self.words + self.pieces


def choose_entries(
    wordpiece: WordPiece, counts: Mapping[str, int], most: int, report: Callable[[int], None] = lambda done: None
) -> NewEntries:
    """Chooses at most `most` entries for a text. The result depends only on the arguments: ties are broken by
    spelling.

    - A character is chosen if it makes words [UNK] and occurs often enough in them: 1 / (WORTH * entries) of all
      characters, as when a vocabulary is trained, and at least LEAST times.
    - Then words, each time the one with the highest count * (pieces - 1), with the pieces into which the vocabulary so
      far cuts it. Words of fewer than LEAST occurrences, longer than `longest_word` or still [UNK] are not chosen.
    - If words run out, pieces that join two adjacent pieces, each time the one that occurs most often.

    Args:
        counts: word, after normalization and pre-tokenization -> number of occurrences.
        report: receives the number of entries chosen so far.
    """
    vocabulary = set(wordpiece.tokens)
    counts = {word: count for word, count in counts.items() if len(word) <= wordpiece.longest_word}
    characters = _characters(vocabulary, counts, most, len(wordpiece.tokens))
    vocabulary.update(characters)
    words = _words(vocabulary, counts, most - len(characters), lambda done: report(len(characters) + done))
    rest = most - len(characters) - len(words)
    pieces = _pieces(vocabulary, counts, rest, lambda done: report(most - rest + done)) if rest else []
    return NewEntries(tuple(characters), tuple(words), tuple(pieces))


def _characters(vocabulary: set[str], counts: Mapping[str, int], most: int, entries: int) -> list[str]:
    """Missing characters, most frequent first; each with all the forms, with and without ##, that words need."""
    total = 0
    often: dict[str, int] = defaultdict(int)
    forms: dict[str, set[str]] = defaultdict(set)
    for word, count in counts.items():
        total += len(word) * count
        if pieces_of(word, vocabulary) is None:
            for index, character in enumerate(word):
                if (form := PREFIX * (index > 0) + character) not in vocabulary:
                    often[character] += count
                    forms[character].add(form)
    least = max(LEAST, total / (WORTH * (entries + most)))
    chosen: list[str] = []
    for character in sorted(often, key=lambda c: (-often[c], c)):
        if often[character] < least or len(chosen) + len(forms[character]) > most:
            break
        chosen += sorted(forms[character], key=len)
    return chosen


def _words(vocabulary: set[str], counts: Mapping[str, int], most: int, report: Callable[[int], None]) -> list[str]:
    """Whole words, each of which saves the most tokens of those that remain; they are added to `vocabulary`."""
    candidates = sorted(word for word, count in counts.items() if count >= LEAST)
    saved: dict[str, int] = {}
    heap: list[tuple[int, str]] = []

    def measure(word: str) -> None:
        pieces = pieces_of(word, vocabulary)
        saved[word] = counts[word] * (len(pieces) - 1) if pieces else 0
        if saved[word]:
            heapq.heappush(heap, (-saved[word], word))

    for word in candidates:
        measure(word)
    chosen: list[str] = []
    while heap and len(chosen) < most:
        negative, word = heapq.heappop(heap)
        if saved[word] != -negative or word in vocabulary:  # measured again since
            continue
        vocabulary.add(word)
        chosen.append(word)
        report(len(chosen))
        index = bisect_left(candidates, word)
        while index < len(candidates) and candidates[index].startswith(word):
            measure(candidates[index])
            index += 1
    return chosen


def _pieces(vocabulary: set[str], counts: Mapping[str, int], most: int, report: Callable[[int], None]) -> list[str]:
    """Pieces that join two adjacent ones, each the one that occurs most often in the words that are still cut; they
    are added to `vocabulary`."""
    cuts: dict[str, list[str]] = {}
    often: dict[str, int] = defaultdict(int)
    holders: dict[str, set[str]] = defaultdict(set)  # piece -> the words that it is a part of
    changed: set[str] = set()

    def count(word: str, sign: int) -> None:
        for joined in _joined(cuts[word]):
            often[joined] += sign * counts[word]
            changed.add(joined)

    def cut(word: str) -> None:
        cuts[word] = pieces_of(word, vocabulary) or []
        count(word, 1)
        for piece in cuts[word]:
            holders[piece].add(word)

    for word in counts:
        cut(word)
    heap = [(-often[joined], joined) for joined in changed]
    heapq.heapify(heap)
    chosen: list[str] = []
    while heap and len(chosen) < most:
        negative, entry = heapq.heappop(heap)
        if -negative < LEAST:
            break
        if often[entry] != -negative or entry in vocabulary:
            continue
        begun = _longest_prefix(entry, vocabulary)
        vocabulary.add(entry)
        chosen.append(entry)
        report(len(chosen))
        changed.clear()
        text = entry.removeprefix(PREFIX)
        for word in [word for word in holders[begun] if text in word]:
            count(word, -1)
            for piece in cuts[word]:
                holders[piece].discard(word)
            cut(word)
        for joined in changed:
            heapq.heappush(heap, (-often[joined], joined))
    return chosen


def _joined(pieces: list[str]) -> Iterator[str]:
    """The entries that would join two adjacent pieces."""
    for first, second in pairwise(pieces):
        yield first + second[len(PREFIX) :]


def _longest_prefix(entry: str, vocabulary: set[str]) -> str:
    """The longest proper prefix of an entry in the vocabulary; a part of one of its pieces, so there is one."""
    return next(entry[:end] for end in range(len(entry) - 1, 0, -1) if entry[:end] in vocabulary)
