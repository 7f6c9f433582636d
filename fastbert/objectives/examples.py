"""A few held-out sentences and what the networks make of them, for people to look at: a word is masked and filled in
again, or a generator or meta controller replaces some and the encoder is asked which."""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import some
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
        said = "; ".join(f"{name}: {some(words)}" for name, words in parts.items() if words)
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


def sentences(stream: Stream, vocabulary: WordPiece, length: int, count: int) -> list[list[int]]:
    """Up to `count` sentences spread over a split; none is longer than `length` with [CLS] and [SEP]."""
    starts = [number * len(stream) // count for number in range(count)]
    stretches = [stream.read(start, min(start + WINDOW, len(stream))).tolist() for start in starts]
    return [ids for stretch in stretches if (ids := sentence(stretch, vocabulary, length - 2))]


@torch.no_grad()
def fill_in(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int, count: int = 5) -> list[Filled]:
    """Masks one whole word in each of up to `count` sentences."""
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    out = []
    for number, ids in enumerate(sentences(stream, vocabulary, length, count)):
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


@torch.no_grad()
def spot(objective: nn.Module, stream: Stream, vocabulary: WordPiece, length: int, count: int = 5) -> list[Spotted]:
    """Replaces words in each of up to `count` sentences as in training, and asks the encoder which they are."""
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    out = []
    for number, ids in enumerate(sentences(stream, vocabulary, length, count)):
        row = torch.tensor([[vocabulary.ids["[CLS]"], *ids, vocabulary.ids["[SEP]"]]], device=device)
        drawn = objective.draw(Batch(row, torch.tensor([number], device=device)), 0, 0, "validation-mask")
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
    objective.train(training)
    return out


def join(pieces: list[str]) -> str:
    """Pieces as readable text."""
    return " ".join(pieces).replace(" ##", "").replace(" .", ".").replace(" ,", ",").replace(" ' ", "'")
