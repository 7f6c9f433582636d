import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastbert.objectives.masking import choose_places, corrupt, masked_places
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


@settings(deadline=None)
@given(rows_of_ids, st.integers(1, 24), st.booleans())
def test_places_are_distinct_ordered_and_never_special(rows, count, whole) -> None:
    ids = torch.tensor(rows)
    count = min(count, ids.shape[1])
    places, valid = choose_places(ids, SPECIAL, keys(len(rows)), count, CONTINUES if whole else None)
    assert places.shape == valid.shape == (len(rows), count)
    for row, chosen, good in zip(ids, places, valid, strict=True):
        real = chosen[good].tolist()
        assert len(set(real)) == len(real)
        assert real == sorted(real)
        assert not SPECIAL[row[real]].any()
        if not whole:
            assert len(real) == min(count, int((~SPECIAL[row]).sum()))


@settings(deadline=None)
@given(rows_of_ids, st.integers(1, 12))
def test_whole_words_are_whole(rows, count) -> None:
    ids = torch.tensor(rows)
    count = min(count, ids.shape[1])
    places, valid = choose_places(ids, SPECIAL, keys(len(rows)), count, CONTINUES)
    for row, chosen, good in zip(ids.tolist(), places, valid, strict=True):
        real = set(chosen[good].tolist())
        words, word = [], []
        for place, token in enumerate(row):
            if token < 5:
                word = []
            elif token >= 15 and word:
                word.append(place)
            else:
                word = [place]
                words.append(word)
        for word in words:
            assert not real & set(word) or real >= set(word)
        if len(real) < count:  # only a word too long for the rest may leave places over
            rest = [word for word in words if not real & set(word)]
            assert not rest or max(map(len, rest)) > count - len(real)


def test_every_place_is_chosen_equally_often() -> None:
    ids = torch.full((20_000, 12), 7)
    ids[:, 0] = 2
    places, _ = choose_places(ids, SPECIAL, keys(20_000), 3)
    counts = torch.bincount(places.flatten(), minlength=12)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3


def test_shares_of_mask_random_and_kept() -> None:
    ids = torch.full((5000, 40), 7)
    places, valid = choose_places(ids, SPECIAL, keys(5000), 10)
    new = corrupt(
        ids, places, valid, keys(5000), mask_id=4, ordinary_ids=ORDINARY, mask_token_share=0.8, random_token_share=0.1
    )
    there = new.gather(1, places)
    n = there.numel()
    masked, kept = int((there == 4).sum()), int((there == 7).sum())
    random = n - masked - kept
    # A random word may be the word itself.
    expected = [0.8 * n, 0.1 * n * 14 / 15, 0.1 * n * (1 + 1 / 15)]
    assert stats.chisquare([masked, random, kept], expected).pvalue > 1e-3
    drawn = there[(there != 4) & (there != 7)]
    assert stats.chisquare(torch.bincount(drawn, minlength=V)[[*range(5, 7), *range(8, V)]].numpy()).pvalue > 1e-3
    untouched = torch.ones_like(ids, dtype=torch.bool).scatter_(1, places, False)
    assert (new[untouched] == 7).all()


def test_fate_is_independent_of_the_choice() -> None:
    """Were the hash that picks places used for the fate too, the first picked would always be masked."""
    ids = torch.full((4000, 30), 7)
    k = keys(4000)
    places, valid = choose_places(ids, SPECIAL, k, 5)
    new = corrupt(ids, places, valid, k, mask_id=4, ordinary_ids=ORDINARY, mask_token_share=0.5, random_token_share=0)
    share = (new.gather(1, places) == 4).double().mean(0)
    assert ((share - 0.5).abs() < 0.03).all()


def test_masks_depend_on_the_place_in_the_global_batch_alone() -> None:
    ids = torch.randint(0, V, (8, 16), generator=torch.Generator().manual_seed(0))
    whole, _ = choose_places(ids, SPECIAL, keys(8), 4)
    part, _ = choose_places(ids[5:], SPECIAL, row_keys(0, "mask", 0, torch.arange(5, 8)), 4)
    assert (whole[5:] == part).all()
    other, _ = choose_places(ids, SPECIAL, keys(8, seed=1), 4)
    assert (whole != other).any()


@pytest.mark.parametrize(("length", "rate", "count"), [(128, 0.15, 19), (64, 0.3, 19), (2, 0.15, 1)])
def test_number_of_places(length: int, rate: float, count: int) -> None:
    assert masked_places(length, rate) == count
