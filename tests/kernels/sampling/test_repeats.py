"""Samples with replacement, from those without: their joint distribution."""

import torch
from fastbert_kernels import sample_distinct, with_replacement
from scipy.stats import chisquare


def test_samples_are_independent() -> None:
    """All triples of four words, compared with products of the probabilities; one word is forbidden."""
    p, count = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64), 30_000
    logits = torch.cat([p.log(), torch.zeros(1)])[None].expand(count, -1)
    keys = torch.arange(count, dtype=torch.int32)
    ids, log_p = sample_distinct(logits, 3, keys, forbidden=torch.tensor([4]))
    found = with_replacement(ids, log_p, keys)
    assert torch.equal(found[:, 0], ids[:, 0]) and (found[:, 1] == found[:, 0]).any()
    triples = (found * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64)
    expected = p[:, None, None] * p[:, None] * p * count
    assert chisquare(triples, expected.flatten()).pvalue > 1e-4


def test_rows_without_a_distribution_give_words_of_theirs() -> None:
    keys = torch.arange(2, dtype=torch.int32)
    ids, _ = sample_distinct(torch.full((2, 5), torch.nan), 3, keys)
    found = with_replacement(ids, torch.full((2, 3), torch.nan), keys)
    assert (found[:, :, None] == ids[:, None]).any(2).all()
