"""A few held-out sentences with a word masked, and what the model puts there: for people to look at."""

from dataclasses import dataclass

import torch
from torch import nn

from fastbert.data.batches import Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.randomness import row_keys

READ = 20_000  # tokens looked at
SHORTEST, LONGEST = 8, 32  # tokens of a sentence


@dataclass(frozen=True)
class Filled:
    before: str
    after: str
    answer: str
    guesses: list[tuple[str, float]]
    """The likeliest words with their probabilities."""

    def __str__(self) -> str:
        guesses = ", ".join(f"{word} {100 * share:.0f} %" for word, share in self.guesses)
        return f"{self.before} [{self.answer}] {self.after}\n      -> {guesses}"


def sentences(stream: Stream, vocabulary: WordPiece) -> list[list[int]]:
    """Whole sentences from the beginning of a split, by their full stops."""
    unk, sep = vocabulary.ids["[UNK]"], vocabulary.ids["[SEP]"]
    stop = vocabulary.ids.get(".", sep)
    ids = stream.read(0, min(READ, len(stream))).tolist()
    out: list[list[int]] = []
    current: list[int] = []
    for index in ids:
        current.append(index)
        if index in (stop, sep):
            plain = sep not in current and unk not in current
            if plain and SHORTEST <= len(current) <= LONGEST:
                out.append(current)
            current = []
    return out


@torch.no_grad()
def fill_in(objective: nn.Module, stream: Stream, vocabulary: WordPiece, count: int = 5) -> list[Filled]:
    """Masks one whole word in each of `count` sentences spread over the beginning of a split."""
    found = sentences(stream, vocabulary)
    found = [found[i * len(found) // count] for i in range(min(count, len(found)))]
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    out = []
    for number, ids in enumerate(found):
        pieces = [vocabulary.tokens[index] for index in ids]
        whole = [
            place
            for place, piece in enumerate(pieces[:-1])
            if piece.isalpha() and len(piece) > 2 and not pieces[place + 1].startswith("##")
        ]
        if not whole:
            continue
        draw = int(row_keys(0, "sample", 0, torch.tensor([number]))[0]) % len(whole)
        place = whole[draw]
        masked = [vocabulary.ids["[CLS]"], *ids, vocabulary.ids["[SEP]"]]
        masked[place + 1] = vocabulary.ids["[MASK]"]
        hidden = objective.encoder(torch.tensor([masked], device=device))
        shares, guesses = objective.head(hidden[0, place + 1]).float().softmax(-1).topk(3)
        words = [vocabulary.tokens[guess] for guess in guesses.tolist()]
        likeliest = list(zip(words, shares.tolist(), strict=True))
        out.append(Filled(join(pieces[:place]), join(pieces[place + 1 :]), pieces[place], likeliest))
    objective.train(training)
    return out


def join(pieces: list[str]) -> str:
    """Pieces as readable text."""
    return " ".join(pieces).replace(" ##", "").replace(" .", ".").replace(" ,", ",").replace(" ' ", "'")
