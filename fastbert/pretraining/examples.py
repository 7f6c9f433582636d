"""A few held-out sentences with a word masked, and what the model puts there: for people to look at."""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from fastbert.data.batches import Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.randomness import row_keys

WINDOW = 2000  # tokens looked at for a sentence
SHORTEST = 8  # tokens of a sentence


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


def sentence(ids: list[int], vocabulary: WordPiece, longest: int) -> list[int] | None:
    """The first whole sentence in a stretch of tokens, by its full stops; None if there is none that fits."""
    unk, sep = vocabulary.ids["[UNK]"], vocabulary.ids["[SEP]"]
    stop = vocabulary.ids.get(".", sep)
    ends = [place for place, index in enumerate(ids) if index in (stop, sep)]
    for before, end in itertools.pairwise(ends):
        found = ids[before + 1 : end + 1]
        if SHORTEST <= len(found) <= longest and unk not in found and sep not in found:
            return found
    return None


@torch.no_grad()
def fill_in(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int, count: int = 5) -> list[Filled]:
    """Masks one whole word in each of up to `count` sentences spread over a split; none is longer than `length`."""
    starts = [number * len(stream) // count for number in range(count)]
    stretches = [stream.read(start, min(start + WINDOW, len(stream))).tolist() for start in starts]
    found = [ids for stretch in stretches if (ids := sentence(stretch, vocabulary, length - 2))]
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
