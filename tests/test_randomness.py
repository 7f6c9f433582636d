import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.randomness import PURPOSES, permute, row_keys


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_permutation_is_one(count: int, seed: int, epoch: int) -> None:
    out = permute(torch.arange(count), count, seed, epoch)
    assert sorted(out.tolist()) == list(range(count))


def test_permutation_of_a_large_range_by_parts() -> None:
    count = 3 * 10**9
    index = torch.randint(0, count, (1000,), generator=torch.Generator().manual_seed(0)).unique()
    out = permute(index, count, 1, 0)
    assert out.min() >= 0 and out.max() < count
    assert out.unique().numel() == index.numel()
    assert (permute(index[:10], count, 1, 0) == out[:10]).all()


def test_permutations_differ_and_mix() -> None:
    index = torch.arange(1000)
    orders = [permute(index, 1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        assert (a == index).double().mean() < 0.02
        assert abs(torch.corrcoef(torch.stack([a.double(), index.double()]))[0, 1]) < 0.15
        for b in orders[:i]:
            assert (a == b).double().mean() < 0.02


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


def test_unknown_purpose() -> None:
    with pytest.raises(KeyError):
        row_keys(0, "maks", 0, torch.arange(1))
