"""Words become pieces as in transformers, and every word is scored once, in the window with the most context."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.finetuning.kinds.tokens import IGNORED, Tokens
from fastbert.finetuning.rows import Example
from fastbert.finetuning.word_batches import scored_words, windows
from tests.finetuning.conftest import WORDS

VOCABULARY = WordPiece((*WORDS, "!", "##a", "##b"))
KIND = Tokens(("N", "V", "X"))


@given(
    st.integers(6, 20).flatmap(
        lambda room: st.tuples(
            st.just(room), st.lists(st.integers(1, 4) | st.integers(1, room), min_size=1, max_size=40)
        )
    )
)
def test_each_word_is_scored_in_the_window_with_more_context(given_) -> None:
    room, pieces = given_
    spans = windows(np.array(pieces), room)
    scored = scored_words(spans, len(pieces))
    assert [word for low, high in scored for word in range(low, high)] == list(range(len(pieces)))
    for (first, end), (low, high) in zip(spans, scored, strict=True):
        assert first <= low < high <= end and sum(pieces[first:end]) <= room
        for word in range(low, high):
            context = min(word - first, end - 1 - word)
            for other, stop in spans:
                if other <= word < stop and (other, stop) != (first, end):
                    assert context >= min(word - other, stop - 1 - word)
    for (_, end), (start, _) in pairwise(spans):
        assert start <= end and sum(pieces[start:end]) <= room / 4
    if sum(pieces) <= room:
        assert spans == [(0, len(pieces))]


def test_words_that_fit_overlap() -> None:
    spans = windows(np.ones(20, int), 8)
    assert spans == [(0, 8), (6, 14), (12, 20)]
    assert scored_words(spans, 20) == [(0, 7), (7, 13), (13, 20)]


def words(*texts: str, label: tuple | None = None) -> Example:
    ends = np.cumsum([len(text) + 1 for text in texts])
    ranges = tuple((int(end) - len(text) - 1, int(end) - 1) for text, end in zip(texts, ends, strict=True))
    return Example(0, " ".join(texts), None, label, ranges)


def test_pieces_equal_transformers_and_labels_are_at_the_first(tmp_path) -> None:
    from transformers import AutoTokenizer

    VOCABULARY.save(tmp_path)
    sentences = [["Goods", "the!bad", "goodab"], ["of", "unknown", "!!", "bads"]]
    tags = [(1, 0, 2), (2, 1, 0, 1)]
    theirs = AutoTokenizer.from_pretrained(tmp_path)(sentences, is_split_into_words=True, padding=True)
    examples = [words(*sentence, label=label) for sentence, label in zip(sentences, tags, strict=True)]
    data = KIND.encode(examples, VOCABULARY, 30)
    batch = data.batch(np.arange(2))
    assert (
        batch.input_ids.tolist() == theirs["input_ids"]
        and batch.attention_mask.long().tolist() == theirs["attention_mask"]
    )
    for row, label in enumerate(tags):
        expected, before = [], None
        for word in theirs.word_ids(row):
            expected.append(IGNORED if word is None or word == before else label[word])
            before = word
        assert batch.labels[row].tolist() == expected
        assert batch.scored[row].tolist() == [value != IGNORED for value in expected]
    assert data.truncated == 0 and SPECIAL_TOKENS[0] in VOCABULARY.tokens


def test_no_word_is_lost() -> None:
    """A word that the tokenizer deletes is [UNK]; a word longer than a window is truncated; a long text is read in
    windows."""
    unk = VOCABULARY.ids["[UNK]"]
    data = KIND.encode([words("\u200d", "a", "\ufe0f", label=(0, 1, 2))], VOCABULARY, 30)
    assert data.tokens.tolist()[1:-1] == [unk, VOCABULARY.ids["a"], unk] and data.labels.tolist()[1:-1] == [0, 1, 2]
    long = words("good" + "ab" * 10, "the", label=(2, 0))
    data = KIND.encode([long], VOCABULARY, 8)
    assert data.truncated == 1 and data.lengths.max() <= 8 and data.labels[data.scored].tolist() == [2, 0]
    assert KIND.encode([words("goodabababab", "badabababab", label=(0, 1))], VOCABULARY, 6).truncated == 1
    count = 50
    many = words(*["of"] * count, label=tuple(n % 3 for n in range(count)))
    short = words("of", label=(2,))
    data = KIND.encode([many, short, many], VOCABULARY, 10)
    assert len(data) == 2 * len(windows(np.ones(count, int), 8)) + 1
    assert data.labels[data.scored].tolist() == [*many.label, 2, *many.label]
    assert [len(part) for part in data.by_example(data.labels[data.scored])] == [count, 1, count]
    assert data.units_in(np.arange(len(data))).tolist() == list(range(2 * count + 1))
    rows = np.array([3, 0])
    batch = data.batch(rows)
    assert data.labels[data.scored][data.units_in(rows)].tolist() == batch.labels[batch.scored].tolist()


def test_soft_labels_and_hard_ones_have_the_same_loss() -> None:
    import torch

    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    targets = torch.tensor([[IGNORED, 2, IGNORED, 0], [1, IGNORED, IGNORED, IGNORED]])
    soft = torch.nn.functional.one_hot(targets.clamp(min=0), 3) * (targets != IGNORED)[..., None]
    hard = KIND.losses(logits, targets)
    torch.testing.assert_close(KIND.losses(logits, soft.double()), hard)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert hard.shape == (2,) and hard.sum().item() == pytest.approx(expected.item())
