"""Notes in a run: the words that get one, whether their dictionary fits in memory, and what is said of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastbert.data.note_words import NoteWords, choose_words
from fastbert.data.prepare import PrepareOptions
from fastbert.data.shards import SPLITS, Dataset
from fastbert.errors import UserError
from fastbert.model.note_dictionary import NoteDictionary
from fastbert.model.options import NoteDictionaryOptions
from fastbert.training.hardware import memory

ENOUGH = 50  # times a word should be met while training: the note of one met five times is noise


@dataclass(frozen=True)
class NoteCorpus:
    """The words with notes of a corpus."""

    options: NoteDictionaryOptions
    words: int
    """W."""
    rarest: int
    """Occurrences in the training text of the rarest of them."""
    commonest: int
    split: dict[tuple[str, int], NoteWords]
    """(split, length of a sequence) -> where they stand."""
    length: int
    """Of the run's longest sequences: what is said and counted is of those."""

    @property
    def train(self) -> NoteWords:
        return self.split["train", self.length]

    def notes(self, width: int, seed: int, device: torch.device) -> NoteDictionary:
        """A dictionary for hidden states of `width`, as it is before training.

        Raises:
            UserError: it does not fit in memory.
        """
        size = self.words * (4 * width + 4)
        for where in dict.fromkeys((torch.device("cpu"), device)):  # it is drawn on the one and kept on the other
            if size > (free := memory(where)[0]):
                raise UserError(
                    f"a dictionary of {self.words:,} notes of {width} numbers takes {size / 1e9:.2f} GB, and {where} "
                    f"has {free / 1e9:.2f} GB left: lower --notes.fraction, narrow --notes.min-count to "
                    "--notes.max-count, or lower --width"
                )
        train = self.train
        tokens = train.rows * (train.width + 1)
        return NoteDictionary(
            self.options, self.words, width, seed, len(train.positions) / tokens, train.tokens / tokens
        )

    def summary(self, sequences: int) -> list[str]:
        """What is said before a training over so many sequences."""
        train = self.train
        epochs = sequences / train.rows
        lines = [
            f"notes for {self.words:,} words that occur {self.rarest} to {self.commonest} times: "
            f"{100 * train.rows_touched / train.rows:.1f} % of the sequences hold one, "
            f"{100 * train.tokens / (train.rows * (train.width + 1)):.2f} % of the tokens are theirs"
        ]
        if self.rarest * epochs < ENOUGH:
            least = math.ceil(ENOUGH / epochs)
            narrower = f", or choose words that are met more often (--notes.min-count {least})"
            lines.append(
                f"the rarest of them are met about {self.rarest * epochs:.1f} times in these {epochs:.3f} epochs, and "
                f"a note of less than {ENOUGH} contexts is mostly noise; train longer"
                + (narrower if least <= self.options.max_count else "")
            )
        return lines


def rare_band(options: NoteDictionaryOptions) -> dict[str, int]:
    """What a source is prepared with so that the words with notes are listed: prepare's own band, wider if need be."""
    if not options.enabled:
        return {}
    return {
        "rare_min": min(options.min_count, PrepareOptions.rare_min),
        "rare_max": max(options.max_count, PrepareOptions.rare_max),
    }


def find_note_words(
    options: NoteDictionaryOptions, dataset: Dataset, length: int, lengths: Iterable[int]
) -> NoteCorpus:
    """Chooses the words and finds them in both splits.

    Args:
        length: of the sequences that the words are chosen by.
        lengths: all that there are in the run.

    Raises:
        UserError: no such words in the corpus, or not listed when it was prepared.
    """
    row_of_word = choose_words(dataset, options.min_count, options.max_count, options.fraction, length)
    counts = dataset.rare_counts[row_of_word >= 0]
    return NoteCorpus(
        options,
        len(counts),
        int(counts.min()),
        int(counts.max()),
        {
            (split, each): NoteWords(dataset.split(split), row_of_word, each, options.half_window)
            for split in SPLITS
            for each in lengths
        },
        length,
    )
