import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastbert.objectives.masking import OVERHANG, choose_positions, corrupt, mask_count
from fastbert.randomness import row_keys

V = 20  # ids 0 to 4 are special, 15 to 19 continue a word
SPECIAL = torch.arange(V) < 5
CONTINUES = torch.arange(V) >= 15
ORDINARY = torch.arange(5, V)


def keys(rows: int, seed: int = 0) -> torch.Tensor:
    return row_keys(seed, "mask", 0, torch.arange(rows))


rows_of_ids = st.integers(1, 24).flatmap(
    lambda t: st.lists(st.lists(st.integers(0, V - 1), min_size=t, max_size=t), min_size=1, max_size=4)
)


@given(rows_of_ids, st.integers(1, 24), st.booleans())
def test_positions_are_distinct_ordered_and_never_special(rows, count, whole) -> None:
    ids = torch.tensor(rows)
    count = min(count, ids.shape[1])
    positions, valid = choose_positions(ids, SPECIAL, keys(len(rows)), count, CONTINUES if whole else None)
    room = min(ids.shape[1], count + OVERHANG) if whole else count
    assert positions.shape == valid.shape == (len(rows), room)
    for row, chosen, good in zip(ids, positions, valid, strict=True):
        real = chosen[good].tolist()
        assert len(set(real)) == len(real)
        assert real == sorted(real)
        assert not SPECIAL[row[real]].any()
        if not whole:
            assert len(real) == min(count, int((~SPECIAL[row]).sum()))


@given(rows_of_ids, st.integers(1, 12))
def test_whole_words_are_whole(rows, count) -> None:
    ids = torch.tensor(rows)
    count = min(count, ids.shape[1])
    positions, valid = choose_positions(ids, SPECIAL, keys(len(rows)), count, CONTINUES)
    for row, chosen, good in zip(ids.tolist(), positions, valid, strict=True):
        real = set(chosen[good].tolist())
        words, word = [], []
        for index, token in enumerate(row):
            if token < 5:
                word = []
            elif token >= 15 and word:
                word.append(index)
            else:
                word = [index]
                words.append(word)
        for word in words:
            assert not real & set(word) or real >= set(word)
        if count >= sum(map(len, words)):
            assert real == {index for word in words for index in word}


def rows_of_words(rows: int, length: int, sizes: list[int]) -> torch.Tensor:
    """[CLS], then words of random sizes, the last of which the row may cut: int64 [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor(sizes)[torch.randint(len(sizes), (rows, length), generator=generator)]
    starts = chosen.cumsum(1) - chosen
    ids = torch.full((rows, length + max(sizes) * length), 16).scatter_(1, starts, 7)[:, : length - 1]
    return torch.nn.functional.pad(ids, (1, 0), value=2)


@pytest.mark.parametrize(
    ("length", "rows", "sizes"),
    [
        (32, 20_000, [1, 5]),
        (32, 20_000, [1, 2, 3, 4, 5, 6, 7, 8]),
        (128, 4_000, [1, 1, 1, 2, 3, 5, 8]),
        (64, 8_000, [1] * 100 + [12, 16]),  # rare words with more pieces than fit behind the window
    ],
)
def test_words_of_all_sizes_are_masked_equally_often(length: int, rows: int, sizes: list[int]) -> None:
    ids = rows_of_words(rows, length, sizes)
    count = mask_count(length, 0.15)
    positions, valid = choose_positions(ids, SPECIAL, keys(rows), count, CONTINUES)
    masked = torch.zeros_like(ids).scatter_(1, positions, valid.long())
    starts = ids == 7
    word = torch.where(starts, torch.arange(length), 0).cummax(1).values
    size = torch.zeros_like(ids).scatter_add_(1, word, (ids != 2).long())
    assert torch.equal(masked[ids != 2], masked.gather(1, word)[ids != 2])  # words are masked whole
    fraction = count / (length - 1)
    long = max(sizes) > OVERHANG + 1
    for pieces in range(1, max(sizes) + 1):
        trials = int((starts & (size == pieces)).sum())
        tolerance = 4.5 * (fraction * (1 - fraction) / max(trials, 1)) ** 0.5 + 0.01 * long
        rate = masked[starts & (size == pieces)].double().mean().item()
        assert not trials or rate == pytest.approx(fraction, abs=tolerance), f"words of {pieces} pieces"
    assert masked.double().mean().item() == pytest.approx(count / length, abs=0.002 + 0.01 * long)


def test_a_word_longer_than_all_masked_positions_costs_the_others_nothing() -> None:
    ids = torch.full((4_000, 41), 16)
    ids[:, 0], ids[:, 1], ids[:, 21:] = 2, 7, 7  # a word of 20 pieces, 20 of one
    positions, valid = choose_positions(ids, SPECIAL, keys(4_000), 6, CONTINUES)
    masked = torch.zeros_like(ids).scatter_(1, positions, valid.long()).double().mean(0)
    assert masked[:21].sum() == 0
    assert masked[21:].mean().item() == pytest.approx(6 / 40, abs=0.006)


def test_single_pieces_are_masked_as_they_always_were() -> None:
    """Runs without whole words keep their masks to the bit."""
    ids = torch.randint(0, V, (64, 48), generator=torch.Generator().manual_seed(0))
    positions, valid = choose_positions(ids, SPECIAL, keys(64), mask_count(48, 0.15))
    found = hashlib.sha256(positions.numpy().tobytes() + valid.numpy().tobytes()).hexdigest()
    assert found == "d427a9c4aa6f85a33bdf94e2db173268892b89c34883bf49214946ad67ee3370"


def test_every_position_is_masked_equally_often() -> None:
    ids = torch.full((20_000, 12), 7)
    ids[:, 0] = 2
    positions, _ = choose_positions(ids, SPECIAL, keys(20_000), 3)
    counts = torch.bincount(positions.flatten(), minlength=12)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3


def test_fractions_of_mask_random_and_original() -> None:
    ids = torch.full((5000, 40), 7)
    positions, valid = choose_positions(ids, SPECIAL, keys(5000), 10)
    new = corrupt(ids, positions, valid, keys(5000), 4, ORDINARY, (0.8, 0.1))
    there = new.gather(1, positions)
    n = there.numel()
    masked, unchanged = int((there == 4).sum()), int((there == 7).sum())
    random = n - masked - unchanged
    # A random word may be the word itself.
    expected = [0.8 * n, 0.1 * n * 14 / 15, 0.1 * n * (1 + 1 / 15)]
    assert stats.chisquare([masked, random, unchanged], expected).pvalue > 1e-3
    counts = torch.bincount(there[(there != 4) & (there != 7)], minlength=V)
    assert stats.chisquare(counts[[*range(5, 7), *range(8, V)]].numpy()).pvalue > 1e-3
    untouched = torch.ones_like(ids, dtype=torch.bool).scatter_(1, positions, False)
    assert (new[untouched] == 7).all()


def test_what_positions_show_is_independent_of_their_choice() -> None:
    """If one hash chose both the positions and what they show, the first position would always show [MASK]."""
    ids = torch.full((4000, 30), 7)
    k = keys(4000)
    positions, valid = choose_positions(ids, SPECIAL, k, 5)
    new = corrupt(ids, positions, valid, k, 4, ORDINARY, (0.5, 0.0))
    fraction = (new.gather(1, positions) == 4).double().mean(0)
    assert ((fraction - 0.5).abs() < 0.03).all()


def test_masks_depend_on_the_row_of_the_global_batch_alone() -> None:
    ids = torch.randint(0, V, (8, 16), generator=torch.Generator().manual_seed(0))
    whole, _ = choose_positions(ids, SPECIAL, keys(8), 4)
    part, _ = choose_positions(ids[5:], SPECIAL, row_keys(0, "mask", 0, torch.arange(5, 8)), 4)
    assert (whole[5:] == part).all()
    other, _ = choose_positions(ids, SPECIAL, keys(8, seed=1), 4)
    assert (whole != other).any()


@pytest.mark.parametrize(
    ("length", "rate", "count", "whole"), [(128, 0.15, 19, 26), (64, 0.3, 19, 26), (2, 0.15, 1, 2)]
)
def test_number_of_positions(length: int, rate: float, count: int, whole: int) -> None:
    assert mask_count(length, rate) == count
    assert mask_count(length, rate, whole_word=True) == whole
