import numpy as np
import pytest
import torch
from fastbert_kernels import combine
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.randomness import PURPOSES, permute, row_keys


@settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_permutation_is_one(count: int, seed: int, epoch: int) -> None:
    out = permute(np.arange(count), count, seed, epoch)
    assert sorted(out.tolist()) == list(range(count))


def test_permutation_of_a_large_range_by_parts() -> None:
    count = 3 * 10**9
    index = np.unique(np.random.default_rng(0).integers(0, count, 1000))
    out = permute(index, count, 1, 0)
    assert out.min() >= 0 and out.max() < count
    assert len(np.unique(out)) == len(index)
    assert (permute(index[:10], count, 1, 0) == out[:10]).all()


def test_permutations_differ_and_mix() -> None:
    index = np.arange(1000)
    orders = [permute(index, 1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        assert (a == index).mean() < 0.02
        assert abs(np.corrcoef(a, index)[0, 1]) < 0.15
        for b in orders[:i]:
            assert (a == b).mean() < 0.02


def test_row_keys_separate_seed_purpose_step_and_row() -> None:
    keys = {
        (seed, purpose, step): row_keys(seed, purpose, step, torch.arange(50))
        for seed in (0, 1, 2**33)
        for purpose in PURPOSES
        for step in (0, 1, 2**33)
    }
    everything = torch.cat(list(keys.values()))
    assert everything.unique().numel() == everything.numel()
    assert (row_keys(0, "mask", 1, torch.arange(10, 20)) == keys[0, "mask", 1][10:20]).all()


@pytest.mark.parametrize("seed", [0, 2**31, 2**40 + 3])
def test_words_of_a_row_key_are_combined_as_tensors_are(seed: int) -> None:
    """Seed, purpose and step are hashed as Python integers, the indices as a tensor."""
    rows, step = torch.tensor([0, 1, 2**31 - 1]), 2**33 + 5
    key = torch.zeros((), dtype=torch.int32)
    for word in (seed, seed >> 32, PURPOSES["mask"], step, step >> 32):
        key = combine(key, word)
    assert torch.equal(row_keys(seed, "mask", step, rows), combine(key, rows.int()))


def test_permutations_do_not_change() -> None:
    """Otherwise no run could be resumed exactly."""
    assert permute(np.arange(8), 8, 3, 1).tolist() == [1, 4, 3, 5, 6, 2, 0, 7]
    assert permute(np.array([0, 10**9]), 3 * 10**9, 2**40, 2**33).tolist() == [2960893432, 53031807]


def test_unknown_purpose() -> None:
    with pytest.raises(KeyError):
        row_keys(0, "maks", 0, torch.arange(1))
