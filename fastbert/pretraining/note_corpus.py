"""The note dictionary of a run: its words, the check that it fits in memory, and the lines that describe it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastbert.data.note_index import distinct, index_folder
from fastbert.data.note_words import SENTENCE, NoteFrequencies, NoteWords, choose_words, segment_tokens
from fastbert.data.prepare import PrepareOptions
from fastbert.data.shards import SPLITS, Dataset
from fastbert.errors import UserError
from fastbert.model.note_dictionary import NoteDictionary
from fastbert.model.options import NoteDictionaryOptions
from fastbert.progress import amount
from fastbert.training.hardware import memory
from fastbert.training.splits import NEW, OLD

ENOUGH = 50  # occurrences of a word during training: the note of a word that occurs five times is noise


@dataclass(frozen=True)
class NoteCorpus:
    """Words of a corpus that have notes in the dictionary."""

    options: NoteDictionaryOptions
    words: int
    """Number of words W."""
    rarest: int
    """Occurrences of the rarest word in the training text."""
    commonest: int
    noted: dict[tuple[str, str, int], NoteWords]
    """(name of the data, split, length of a sequence) -> positions of the words."""
    length: int
    """Tokens per sequence, the longest of the run; all counts are for this length."""
    available: int
    """Number of words in the range of counts."""
    segment: int
    """Tokens of a segment, in which `fraction` is measured."""
    replayed: float
    """Fraction of the rows that are old data."""

    @property
    def train(self) -> NoteWords:
        return self.noted[NEW, "train", self.length]

    @property
    def frequencies(self) -> NoteFrequencies:
        """Frequencies in the rows of the run."""
        if not self.replayed:
            return self.train.frequencies
        old = self.noted[OLD, "train", self.length].frequencies
        return self.train.frequencies.mixed(old, self.replayed, self.length)

    def notes(self, width: int, seed: int, device: torch.device) -> NoteDictionary:
        """Creates an untrained dictionary for hidden states of width `width`.

        Raises:
            UserError: it does not fit in memory.
        """
        size = self.words * (4 * width + 4)
        for where in dict.fromkeys((torch.device("cpu"), device)):  # initialized on the CPU, then moved
            if size > (free := memory(where)[0]):
                raise UserError(
                    f"a note dictionary of {self.words:,} words, width {width}, takes {amount(size, 'B')}, and {where} "
                    f"has {amount(free, 'B')} left: lower --notes.fraction, narrow --notes.min-count to "
                    "--notes.max-count, or lower --width"
                )
        return NoteDictionary(self.options, self.words, width, seed, self.frequencies)

    def summary(self, sequences: int) -> list[str]:
        """Lines that describe the words before training on this many sequences."""
        train = self.train
        epochs = sequences * (1 - self.replayed) / train.rows
        tokens = train.rows * train.width
        segments = distinct(train.index.positions, self.segment) / math.ceil(tokens / self.segment)
        every = "all " if self.words == self.available else ""
        lines = [
            f"note dictionary: {every}{self.words:,} words that occur {self.rarest} to {self.commonest} times, in "
            f"{100 * segments:.1f} % of the segments of {SENTENCE} words; {100 * train.index.tokens / tokens:.2f} % of "
            "the tokens belong to them"
        ]
        if self.rarest * epochs < ENOUGH:
            least = math.ceil(ENOUGH / epochs)
            narrower = f", or choose words that occur more often (--notes.min-count {least})"
            lines.append(
                f"the rarest words occur about {self.rarest * epochs:.1f} times in these {epochs:.3f} epochs; a note "
                f"of fewer than {ENOUGH} contexts is mostly noise: train longer"
                + (narrower if least <= self.options.max_count else "")
            )
        return lines


def rare_word_range(options: NoteDictionaryOptions) -> dict[str, int]:
    """Options that make `prepare` list the words with notes: its default range of counts, widened if necessary."""
    if not options.enabled:
        return {}
    return {
        "rare_min": min(options.min_count, PrepareOptions.rare_min),
        "rare_max": max(options.max_count, PrepareOptions.rare_max),
    }


def find_note_words(
    options: NoteDictionaryOptions,
    dataset: Dataset,
    length: int,
    lengths: Iterable[int],
    others: Mapping[str, Dataset] | None = None,
    replayed: float = 0.0,
) -> NoteCorpus:
    """Chooses the words and finds them in both splits, and in the other data where its list of rare words has them.

    Args:
        length: tokens per sequence, the longest of the run.
        lengths: all sequence lengths of the run.
        others: other data of the run by name.
        replayed: fraction of the rows that are data of the name `old`.

    Raises:
        UserError: the corpus has no such words, or they were not listed when it was prepared.
    """
    row_of_word = choose_words(dataset, options.min_count, options.max_count, options.fraction)
    counts = dataset.rare_counts[row_of_word >= 0]
    row_of_spelling = {dataset.rare_words[word]: row_of_word[word] for word in np.flatnonzero(row_of_word >= 0)}
    noted = {}
    for name, data in {NEW: dataset, **(others or {})}.items():
        rows = row_of_word
        if name != NEW:
            rows = np.array([row_of_spelling.get(word, -1) for word in data.rare_words], dtype=np.int32)
        for split in SPLITS if name == NEW or (name == OLD and replayed) else ("validation",):
            for each in lengths:
                folder = index_folder(data.folder, split, data.record["splits"][split]["shards"], rows, each - 1)
                noted[name, split, each] = NoteWords(data.split(split), rows, each, options.half_window, folder)
    return NoteCorpus(
        options,
        len(counts),
        int(counts.min()),
        int(counts.max()),
        noted,
        length,
        int(((dataset.rare_counts >= options.min_count) & (dataset.rare_counts <= options.max_count)).sum()),
        segment_tokens(dataset),
        replayed,
    )
