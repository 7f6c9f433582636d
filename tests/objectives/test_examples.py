import numpy as np
import torch

from fastbert.data.batches import InMemory
from fastbert.data.tokenizer import WordPiece
from fastbert.model.options import EncoderOptions
from fastbert.objectives.examples import fill_in, join, sentence
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions

WORDS = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "nation", "##al", "people", "work", "the"))
STOP, SEP, UNK = 5, 3, 1
GOOD = [10, 8, 9, 10, 6, 7, 8, 9, STOP]  # the people work the nation ##al people work .


def test_only_whole_plain_sentences_that_fit() -> None:
    assert sentence([8, STOP, *GOOD, 8], WORDS, 30) == GOOD
    assert sentence([8, STOP, *GOOD], WORDS, 8) is None  # too long
    assert sentence([8, STOP, 8, 9, STOP], WORDS, 30) is None  # too short
    assert sentence(GOOD, WORDS, 30) is None  # where it began is unknown
    for bad in (UNK, SEP):
        assert sentence([STOP, 10, bad, *GOOD[2:]], WORDS, 30) is None
    assert sentence([SEP, *GOOD], WORDS, 30) == GOOD


def test_the_masked_word_is_whole_and_the_guesses_are_the_models() -> None:
    objective = MLM(EncoderOptions(layers=1, width=8, heads=1).resolve(11, 16), MLMOptions(), WORDS).train()
    stream = InMemory(np.array([STOP, *GOOD * 40], dtype=np.uint16))
    filled = fill_in(objective, stream, WORDS, length=16)
    assert objective.training and len(filled) == 5
    for example in filled:
        assert example.answer in ("people", "work", "the")  # nation ##al is two pieces, the stop no word
        assert sum(p for _, p in example.guesses) <= 1
        text = f"{example.before} {example.answer} {example.after}".replace(" .", ".").split()
        assert " ".join(text) == "the people work the national people work."
    with torch.no_grad():  # make one word certain: it must come first
        objective.head.decoder.bias[8] = 50
    assert all(example.guesses[0][0] == "people" for example in fill_in(objective, stream, WORDS, 16))


def test_join() -> None:
    assert join(["nation", "##al", ",", "work", "."]) == "national, work."
