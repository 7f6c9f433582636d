import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastbert.data.batches import InMemory, PackedRows, TrainingBatches, documents_of, validation_batches
from fastbert.data.stages import BatchPlan, Stage
from fastbert.errors import UserError
from fastbert.randomness import random_below

CPU = torch.device("cpu")
CLS, SEP = 2, 3


def rows(tokens: int = 1000, length: int = 10, **options) -> PackedRows:
    return PackedRows(InMemory(np.arange(5, 5 + tokens, dtype=np.uint16)), length, CLS, SEP, **options)


def batches(batch_size: int, micro: int, seed: int) -> TrainingBatches:
    return TrainingBatches({10: rows()}, BatchPlan.constant(batch_size, 10), micro, seed, CPU)


def test_only_the_last_tokens_are_dropped() -> None:
    packed = rows(1000, 10)
    assert len(packed) == 111
    batch = packed.read(np.arange(111), np.arange(111), CPU)
    assert (batch.input_ids[:, 0] == CLS).all()
    assert batch.input_ids[:, 1:].flatten().tolist() == list(range(5, 5 + 999))


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_sees_every_row_once(batch_size: int, micro: int, seed: int) -> None:
    order = batches(batch_size, micro, seed).order
    seen = np.concatenate([order(np.arange(e * 111, (e + 1) * 111), 10) for e in range(2)])
    assert sorted(seen[:111].tolist()) == sorted(seen[111:].tolist()) == list(range(111))
    assert seen[:111].tolist() != seen[111:].tolist()


def test_micro_batches_cut_the_same_global_batch() -> None:
    """Also across the border of two epochs."""
    for step in (0, 6, 7):
        whole = list(batches(16, 16, 3).at(step))
        parts = list(batches(16, 5, 3).at(step))
        assert [len(part.row_indices) for part in parts] == [5, 5, 5, 1]
        assert torch.cat([part.input_ids for part in parts]).tolist() == whole[0].input_ids.tolist()
        assert torch.cat([part.row_indices for part in parts]).tolist() == list(range(16))


def test_stages_read_all_rows_of_a_length_before_repeating_one() -> None:
    """Across the stages of a growing batch, and in a different order for the second length."""
    plan = BatchPlan((Stage(0, 4, 10), Stage(5, 8, 10), Stage(20, 6, 25), Stage(27, 12, 25)))
    batches = TrainingBatches({length: rows(1000, length) for length in (10, 25)}, plan, 4, 3, CPU)
    for length, steps in ((10, range(20)), (25, range(20, 28))):
        found = [list(batches.at(step)) for step in steps]
        micro = {len(batch.row_indices) for step in found for batch in step[:-1]}
        assert micro == ({4} if length == 25 else set())
        assert all(batch.input_ids.shape[1] == length for step in found for batch in step)
        first = [int(row[1]) for step in found for batch in step for row in batch.input_ids]
        count, width = len(batches.rows[length]), length - 1
        assert sorted(first[:count]) == [5 + width * row for row in range(count)]
        assert len(set(first[count:])) == len(first[count:]) > 0
    for step in (3, 7, 19, 20, 28):
        whole = TrainingBatches(batches.rows, plan, 100, 3, CPU)
        (batch,) = whole.at(step)
        assert torch.cat([part.input_ids for part in batches.at(step)]).equal(batch.input_ids)
        assert batch.row_indices.tolist() == list(range(plan.at(step).batch_size))


@pytest.mark.parametrize("document_mask", [False, True])
def test_offsets_move_all_words_of_a_step_alike(document_mask) -> None:
    """Every offset occurs equally often, whatever the micro-batches; [CLS] stays at 0."""
    plan = BatchPlan((Stage(0, 4, 10, 15), Stage(4000, 4, 25)))
    stream = InMemory(np.tile(np.array([7, 8, 9, SEP, 6], dtype=np.uint16), 200))
    cut = {length: PackedRows(stream, length, CLS, SEP, document_mask) for length in (10, 25)}
    batches, others = (TrainingBatches(cut, plan, 1, seed, CPU) for seed in (3, 4))
    offsets = np.array([[random_below(seed, "offset", step, 16) for step in range(4000)] for seed in (3, 4)])
    assert chisquare(np.bincount(offsets[0], minlength=16)).pvalue > 0.001
    assert chisquare(np.bincount((offsets[0] - offsets[1]) % 16, minlength=16)).pvalue > 0.001
    for step in (0, 1, 17, 3999):
        for of_seed, steps in zip((batches, others), offsets, strict=True):
            parts = list(of_seed.at(step))
            assert len(parts) == 2
            for batch in parts:
                plain = documents_of(batch.input_ids, SEP)[1] if document_mask else torch.arange(10)[None]
                assert batch.position_ids.equal(torch.where(plain > 0, plain + int(steps[step]), 0))
    (last,) = TrainingBatches(cut, plan, 4, 3, CPU).at(4000)
    assert last.position_ids.max() == 5 if document_mask else last.position_ids is None


def test_the_second_length_is_another_permutation() -> None:
    same = {length: rows(count, length) for length, count in ((10, 999), (11, 1110))}
    assert len(same[10]) == len(same[11]) == 111
    batches = TrainingBatches(same, BatchPlan((Stage(0, 4, 10), Stage(1, 4, 11))), 4, 0, CPU)
    second = batches.order(np.arange(111), 11).tolist()
    for epoch in range(3):
        assert batches.order(np.arange(111) + 111 * epoch, 10).tolist() != second


def test_order_depends_on_the_seed() -> None:
    a, b = (batches(16, 16, seed).order(np.arange(50), 10) for seed in (0, 1))
    assert a.tolist() != b.tolist()


def test_document_mask() -> None:
    ids = torch.tensor([[CLS, 7, 8, SEP, 9, SEP, SEP, 7]])
    document_ids, position_ids = documents_of(ids, SEP)
    assert document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 3]]
    assert position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 1, 1]]
    assert rows().read(np.arange(2), np.arange(2), CPU).document_ids is None
    assert rows(document_mask=True).read(np.arange(2), np.arange(2), CPU).document_ids is not None


def test_validation_rows_are_spread_and_fixed() -> None:
    indices = torch.cat([batch.row_indices for batch in validation_batches(rows(), 10, 4, CPU)])
    assert indices.tolist() == [i * 111 // 10 for i in range(10)]
    assert sum(len(batch.row_indices) for batch in validation_batches(rows(), 500, 64, CPU)) == 111


def test_a_corpus_shorter_than_a_batch() -> None:
    with pytest.raises(UserError, match="111 sequences of 10 tokens, less than one batch of 112"):
        batches(112, 16, 0)
    with pytest.raises(UserError, match="length must be at least 2"):
        rows(length=1)
