"""A few held-out sentences and what the networks make of them, for people to look at: a word is masked and filled in
again, or a generator or meta controller replaces some and the encoder is asked which."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import abbreviated
from fastbert.randomness import row_keys

COUNT = 5  # sentences looked for
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


@dataclass(frozen=True)
class Spotted:
    text: str
    """With [word -> replacement]."""
    found: list[str]
    """Replacements that the encoder took for such, with what it says."""
    missed: list[str]
    false_alarms: list[str]

    def __str__(self) -> str:
        parts = {"found": self.found, "missed": self.missed, "false alarm": self.false_alarms}
        said = "; ".join(f"{name}: {abbreviated(words)}" for name, words in parts.items() if words)
        return f"{self.text}\n      -> {said or 'nothing was replaced, and nothing suspected'}"


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


def sentences(
    objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int
) -> Iterator[tuple[Tensor, list[int], Tensor]]:
    """A few sentences spread over a split, none of more than `length` tokens with [CLS] and [SEP]; meanwhile the
    objective evaluates: (number [1], ids, ids with [CLS] and [SEP] [1, T])."""
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    starts = [number * len(stream) // COUNT for number in range(COUNT)]
    stretches = [stream.read(start, min(start + WINDOW, len(stream))).tolist() for start in starts]
    found = [ids for stretch in stretches if (ids := sentence(stretch, vocabulary, length - 2))]
    for number, ids in enumerate(found):
        row = [vocabulary.ids["[CLS]"], *ids, vocabulary.ids["[SEP]"]]
        yield torch.tensor([number], device=device), ids, torch.tensor([row], device=device)
    objective.train(training)


@torch.no_grad()
def fill_in(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int) -> list[Filled]:
    """Masks one whole word in each of a few sentences."""
    out = []
    for number, ids, row in sentences(objective, stream, vocabulary, length):
        pieces = [vocabulary.tokens[index] for index in ids]
        whole = [
            place
            for place, piece in enumerate(pieces[:-1])
            if piece.isalpha() and len(piece) > 2 and not pieces[place + 1].startswith("##")
        ]
        if not whole:
            continue
        place = whole[int(row_keys(0, "sample", 0, number)[0]) % len(whole)]
        row[0, place + 1] = vocabulary.ids["[MASK]"]
        hidden = objective.encoder(row)
        shares, guesses = objective.head(hidden[0, place + 1]).float().softmax(-1).topk(3)
        words = [vocabulary.tokens[guess] for guess in guesses.tolist()]
        likeliest = list(zip(words, shares.tolist(), strict=True))
        out.append(Filled(join(pieces[:place]), join(pieces[place + 1 :]), pieces[place], likeliest))
    return out


@torch.no_grad()
def spot(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int) -> list[Spotted]:
    """Replaces words in each of a few sentences as in training, and asks the encoder which they are."""
    out = []
    for number, ids, row in sentences(objective, stream, vocabulary, length):
        drawn = objective.draw(Batch(row, number), 0, 0, "validation-mask")
        read, suspicion, guesses = objective.show(drawn)
        pieces: list[str] = []
        verdicts: dict[str, list[str]] = {"found": [], "missed": [], "false_alarms": []}
        for place in range(1, len(ids) + 1):
            was, shown = (vocabulary.tokens[int(x[0, place])] for x in (row, read))
            pieces.append(was if was == shown else f"[{was} -> {shown}]")
            share = float(suspicion[0, place])
            guess = f" for '{vocabulary.tokens[int(guesses[0, place])]}'" if guesses is not None and share > 0.5 else ""
            kind = ("missed", "found")[share > 0.5] if was != shown else "false_alarms"
            if was != shown or share > 0.5:
                verdicts[kind].append(f"'{shown}'{guess} {100 * share:.0f} %")
        out.append(Spotted(join(pieces), **verdicts))
    return out


def join(pieces: list[str]) -> str:
    """Pieces as readable text."""
    return " ".join(pieces).replace(" ##", "").replace(" .", ".").replace(" ,", ",").replace(" ' ", "'")
