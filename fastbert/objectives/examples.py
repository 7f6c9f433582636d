"""Held-out sentences with the predictions of the networks, as qualitative examples: one word is masked and predicted,
or a generator or meta controller replaces several words and the encoder detects which."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import abbreviated
from fastbert.randomness import row_keys

COUNT = 5  # sentences
WINDOW = 2000  # tokens that are searched for each sentence
SHORTEST = 8  # tokens of a sentence


@dataclass(frozen=True)
class Filled:
    """A sentence with one masked word."""

    before: str
    after: str
    answer: str
    guesses: list[tuple[str, float]]
    """The most probable words with their probabilities."""

    def __str__(self) -> str:
        guesses = ", ".join(f"'{word}' {100 * p:.0f} %" for word, p in self.guesses)
        return f"{self.before} [{self.answer}] {self.after}\n      -> {guesses}"


@dataclass(frozen=True)
class Detected:
    """A sentence with replaced words, and the replacements that the encoder detected."""

    text: str
    """The sentence, with [word -> replacement]."""
    found: list[str]
    """Replacements that the encoder detected, with its probability."""
    missed: list[str]
    """Replacements that it did not detect."""
    false_alarms: list[str]
    """Original words that it classified as replacements."""

    def __str__(self) -> str:
        parts = {"found": self.found, "missed": self.missed, "false alarm": self.false_alarms}
        verdicts = "; ".join(f"{name}: {abbreviated(words)}" for name, words in parts.items() if words)
        return f"{self.text}\n      -> {verdicts or 'no word was replaced or suspected'}"


def sentence(ids: list[int], vocabulary: WordPiece, longest: int) -> list[int] | None:
    """Finds the first whole sentence among tokens, by full stops; None if no sentence has a suitable length."""
    unk, sep = vocabulary.ids["[UNK]"], vocabulary.ids["[SEP]"]
    stop = vocabulary.ids.get(".", sep)
    ends = [index for index, token in enumerate(ids) if token in (stop, sep)]
    for before, end in itertools.pairwise(ends):
        found = ids[before + 1 : end + 1]
        if SHORTEST <= len(found) <= longest and unk not in found and sep not in found:
            return found
    return None


def sentences(
    objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int
) -> Iterator[tuple[Tensor, list[int], Tensor]]:
    """Sentences spread over a split, of at most `length` tokens with [CLS] and [SEP]; while they are iterated over, the
    objective is in evaluation mode.

    Yields:
        number, int64 [1]; ids; ids with [CLS] and [SEP], int64 [1, T].
    """
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    starts = [number * len(stream) // COUNT for number in range(COUNT)]
    windows = [stream.read(start, min(start + WINDOW, len(stream))).tolist() for start in starts]
    found = [ids for window in windows if (ids := sentence(window, vocabulary, length - 2))]
    for number, ids in enumerate(found):
        row = [vocabulary.ids["[CLS]"], *ids, vocabulary.ids["[SEP]"]]
        yield torch.tensor([number], device=device), ids, torch.tensor([row], device=device)
    objective.train(training)


@torch.no_grad()
def fill_in(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int) -> list[Filled]:
    """Masks one whole word in each of a few sentences and predicts it."""
    out = []
    for number, ids, row in sentences(objective, stream, vocabulary, length):
        pieces = [vocabulary.tokens[index] for index in ids]
        whole = [
            index
            for index, piece in enumerate(pieces[:-1])
            if piece.isalpha() and len(piece) > 2 and not pieces[index + 1].startswith("##")
        ]
        if not whole:
            continue
        index = whole[int(row_keys(0, "sample", 0, number)[0]) % len(whole)]
        row[0, index + 1] = vocabulary.ids["[MASK]"]
        hidden = objective.encoder(row)
        probabilities, guesses = objective.head(hidden[0, index + 1]).float().softmax(-1).topk(3)
        words = [vocabulary.tokens[guess] for guess in guesses.tolist()]
        best = list(zip(words, probabilities.tolist(), strict=True))
        out.append(Filled(join(pieces[:index]), join(pieces[index + 1 :]), pieces[index], best))
    return out


@torch.no_grad()
def detect_replaced(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int) -> list[Detected]:
    """Replaces words in each of a few sentences as in training; the encoder detects which."""
    out = []
    for number, ids, row in sentences(objective, stream, vocabulary, length):
        inputs = objective.sample(Batch(row, number), 0, 0, "validation-mask")
        filled, replaced, guesses = objective.predictions(inputs)
        pieces: list[str] = []
        verdicts: dict[str, list[str]] = {"found": [], "missed": [], "false_alarms": []}
        for index in range(1, len(ids) + 1):
            was, shown = (vocabulary.tokens[int(x[0, index])] for x in (row, filled))
            pieces.append(was if was == shown else f"[{was} -> {shown}]")
            p = float(replaced[0, index])
            guess = f" for '{vocabulary.tokens[int(guesses[0, index])]}'" if guesses is not None and p > 0.5 else ""
            verdict = ("missed", "found")[p > 0.5] if was != shown else "false_alarms"
            if was != shown or p > 0.5:
                verdicts[verdict].append(f"'{shown}'{guess} {100 * p:.0f} %")
        out.append(Detected(join(pieces), **verdicts))
    return out


def join(pieces: list[str]) -> str:
    """Joins pieces to readable text."""
    return " ".join(pieces).replace(" ##", "").replace(" .", ".").replace(" ,", ",").replace(" ' ", "'")
