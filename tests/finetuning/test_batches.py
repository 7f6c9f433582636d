"""Truncation as in BERT, an order that is a function of seed and epoch, and padding to the longest row of a batch."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data.tokenizer import WordPiece
from fastbert.finetuning.batches import encode, reading_order, sample_orders, subset, training_order, truncated_lengths
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.rows import Example
from tests.finetuning.conftest import WORDS, tiny_model

VOCABULARY = WordPiece(WORDS)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """As in BERT's own run_classifier.py."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 80))
def test_pairs_are_truncated_as_in_bert(first: int, second: int, room: int) -> None:
    assert truncated_lengths(first, second, room) == longest_first(first, second, room)


def test_ids_types_and_counts() -> None:
    ids = VOCABULARY.ids
    examples = [Example(0, "good the", "bads", 1), Example(1, "the a of and to", "in is", 0)]
    data = encode(examples, VOCABULARY, 9, Classes().targets)
    batch = data.batch(np.array([1, 0]))
    the, a, of, and_, to, in_ = (ids[word] for word in ("the", "a", "of", "and", "to", "in"))
    cls, sep, pad = ids["[CLS]"], ids["[SEP]"], ids["[PAD]"]
    assert batch.input_ids.tolist() == [
        [cls, the, a, of, and_, sep, in_, ids["is"], sep],
        [cls, ids["good"], the, sep, ids["bad"], ids["##s"], sep, pad, pad],
    ]
    assert batch.token_type_ids.tolist() == [[0] * 6 + [1] * 3, [0] * 4 + [1] * 3 + [0] * 2]
    assert batch.attention_mask.sum(1).tolist() == [9, 7]
    assert batch.labels.tolist() == [0, 1] and batch.labels.dtype == torch.int64
    assert data.truncated == 1
    assert to not in batch.input_ids


def test_a_single_text_has_no_types_and_numbers_are_floats() -> None:
    data = encode([Example(0, "good the", None, 2.5)], VOCABULARY, 30, Number().targets)
    batch = data.batch(np.array([0]))
    assert batch.token_type_ids is None
    assert batch.labels.tolist() == [2.5] and batch.labels.dtype == torch.float32
    assert (
        encode([Example(0, "good", None, None)], VOCABULARY, 30, Number().targets).batch(np.array([0])).labels is None
    )


def test_ids_equal_transformers(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path))
    texts, pairs = ["the good of", "he was", "bad bad"], ["a", "she is not bad", "it, that"]
    examples = [Example(i, text, pair, None) for i, (text, pair) in enumerate(zip(texts, pairs, strict=True))]
    ours = encode(examples, VOCABULARY, 30, Classes().targets).batch(np.arange(3))
    theirs = tokenizer(texts, pairs, padding=True, return_tensors="pt")
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.token_type_ids, theirs["token_type_ids"])
    assert torch.equal(ours.attention_mask.long(), theirs["attention_mask"])


def test_padding_ends_with_the_batch_and_on_a_gpu_at_a_multiple_of_eight_or_the_positions() -> None:
    texts = ["good", " ".join(["the"] * 9), " ".join(["the"] * 27)]
    data = encode([Example(i, text, None, 0) for i, text in enumerate(texts)], VOCABULARY, 30, Classes().targets)
    groups = [np.array(rows) for rows in ([0], [0, 1], [2, 0])]
    assert [data.batch(rows).input_ids.shape[1] for rows in groups] == [3, 11, 29]
    assert [data.batch(rows, "meta").input_ids.shape[1] for rows in groups] == [8, 16, 30]


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_every_row_once_and_one_batch_smaller(count: int, batch_size: int, seed: int, epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(3, 40, count)
    batches = training_order(lengths, batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert sorted(len(batch) for batch in batches)[1:] == [batch_size] * (len(batches) - 1)
    again = training_order(lengths, batch_size, seed, epoch)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_the_order_does_not_change() -> None:
    """Batches of a fine-tuning are the same to the bit as in earlier versions."""
    order = np.concatenate(training_order(np.arange(300) % 17, 8, seed=5, epoch=2))
    found = hashlib.sha256(order.tobytes()).hexdigest()
    assert found == "142bacaa88cdc85fbd06be4430e6a6fd80a447b32358a81aca5f46328b241e53"


def test_batches_come_in_another_order_with_seed_and_epoch() -> None:
    """Even if the batches are the same: the rows that are sorted together all have different lengths."""
    found = [[tuple(rows) for rows in training_order(np.arange(60), 4, *given)] for given in ((0, 0), (0, 1), (1, 0))]
    assert found[0] != found[1] != found[2] != found[0]
    assert sorted(found[0]) == sorted(found[1]) == sorted(found[2])


def test_order_depends_on_seed_and_epoch_and_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 120, 4000)
    orders = [np.concatenate(training_order(lengths, 32, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
    batches = training_order(lengths, 32, 0, 0)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded < 1.06 * lengths.sum()
    heads = [lengths[rows].mean() for rows in batches]
    assert abs(np.corrcoef(heads, np.arange(len(heads)))[0, 1]) < 0.3  # short and long batches come mixed
    other = {frozenset(rows) for rows in training_order(lengths, 32, 0, 1)}
    assert not other & {frozenset(rows) for rows in batches}  # other companions in every epoch


def both_orders(pairs: list[tuple[str, str]], max_length: int) -> list:
    return [
        encode([Example(i, *pair[::way], i) for i, pair in enumerate(pairs)], VOCABULARY, max_length, Classes().targets)
        for way in (1, -1)
    ]


def row_of(data, row: int) -> tuple:
    return data.tokens[data.starts[row] : data.starts[row + 1]].tolist(), int(data.firsts[row])


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=40),
    st.integers(8, 20),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_each_pair_is_read_in_one_of_its_orders(sizes: list, max_length: int, seed: int, epoch: int) -> None:
    orders = both_orders([("good " * first, "the " * second) for first, second in sizes], max_length)
    sampled = sample_orders(orders, seed, epoch)
    assert (sampled.starts == orders[0].starts).all() and (sampled.labels == orders[0].labels).all()
    for row in range(len(sizes)):
        assert row_of(sampled, row) in (row_of(orders[0], row), row_of(orders[1], row))


def test_both_orders_occur_and_depend_on_seed_and_epoch() -> None:
    orders = both_orders([("good", "the bad")] * 400, 30)

    def swapped(seed: int, epoch: int) -> np.ndarray:
        sampled = sample_orders(orders, seed, epoch)
        assert {row_of(sampled, row) == row_of(orders[1], row) for row in range(400)} == {False, True}
        return sampled.firsts == orders[1].firsts

    first, again, later, other = swapped(0, 0), swapped(0, 0), swapped(0, 1), swapped(1, 0)
    assert (first == again).all()
    for one in (first, later, other):
        assert 160 < one.sum() < 240
    for one in (later, other):
        assert 150 < (first == one).sum() < 250  # as of independent coins
    assert sample_orders(orders[:1], 0, 0) is orders[0]


def test_reading_order_is_longest_first() -> None:
    lengths = np.array([5, 9, 5, 30, 7])
    assert [rows.tolist() for rows in reading_order(lengths, 2)] == [[3, 1], [4, 0], [2]]


@given(st.integers(1, 500))
def test_fractions_are_nested(count: int) -> None:
    small, middle, whole = (subset(count, fraction) for fraction in (0.1, 0.3, 1.0))
    assert set(small) <= set(middle) <= set(whole)
    assert whole.tolist() == list(range(count))
    assert len(middle) == max(1, round(0.3 * count))


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_fraction_is_spread_over_the_file(fraction: float) -> None:
    rows = subset(10_000, fraction)
    assert rows.mean() == pytest.approx(5000, rel=0.05)
